"""The resident loop: a team's threads take layer tasks and run them, without Python between layers and
tokens.

The first thread leads: it looks for a task (order.py), gives it to the others, runs it with them, and says
what follows: the next stage, the next token, the end. Waiting is spinning first, then yielding the core, then
sleeping; an idle team costs nothing.
"""

from __future__ import annotations

from crosspool.kernels.numba.compile import inline, kernel
from crosspool.kernels.numba.intrinsics import (
    address_of,
    call_entry,
    fetch_add,
    load_acquire,
    now,
    words,
    yield_core,
)
from crosspool.kernels.numba.team import OWN_WORDS, THREADS
from crosspool.workers.resident.attendance import ALL, review
from crosspool.workers.resident.body_words import (
    ALIVE,
    CHOOSERS,
    DONE,
    ENDED,
    MADE,
    NEXT,
    PASS_CHOOSERS,
    PASS_QUERIES,
    PASS_ROWS,
    PIPED,
    ROW_NUMBERS,
    ROW_OF,
    body_at,
    row_at,
)
from crosspool.workers.resident.calls import NOT_CALLED, SLEEP_FOR, await_call, call, wait_a_little
from crosspool.workers.resident.control import (
    ATTENTION_TASKS,
    ATTENTION_TIME,
    BEATS,
    BELL,
    BODY,
    CHUNK_END,
    ERROR,
    FFN_TASKS,
    FFN_TIME,
    HAS_HEAD,
    INTERVAL,
    NO_REQUEST,
    NO_SLOT,
    PASSED,
    PHASE,
    POSITION,
    RECALLED,
    RETIRED_EVENT,
    SLOT_WORDS,
    SLOTS_IN_USE,
    SPREAD,
    STAGE_BITS,
    START_BY,
    STEPS,
    STOP,
    TASK_PART,
    TASK_SLOT,
    TASK_STAGE,
    TEAM,
    TEAM_WORDS,
    TOKEN_EVENT,
    WIDTH,
)
from crosspool.workers.resident.crew import (
    ATTENDANCE,
    CONTROL,
    CREW_WORDS,
    FFN_STAGE,
    GQA_SPREAD_STAGE,
    GQA_STAGE,
    HEAD_STAGE,
    MLA_SPREAD_STAGE,
    MLA_STAGE,
    NUMBER,
    RING,
    ROOM,
    SHARED,
    SLOT_TABLE,
    STAGES,
    TEAM_TABLE,
)
from crosspool.workers.resident.model_words import LATENT, layer_at
from crosspool.workers.resident.order import (
    INDEX,
    NOTHING,
    PART,
    already_passed,
    choose_task,
    continues_half,
    is_ffn,
    is_head,
    model_of,
    note_begin,
    parts_of,
    slot_at,
    stage_of,
    teams_of,
)
from crosspool.workers.resident.passes import begin_pass, end_row, rows_that_go_on
from crosspool.workers.resident.protocol import (
    await_bell,
    hand_over,
    is_last_part,
    retire,
    ring_bell,
    ring_news,
    send_event,
)

SENT_HOME = -1

# -- tasks ---------------------------------------------------------------------------------------------------


@kernel
def run_stage(crew_address, own, mine, slot_index, stage, part):
    """All threads: one stage of a micro-batch."""
    crew = words(crew_address, CREW_WORDS)
    slot = words(slot_at(crew, slot_index), SLOT_WORDS)
    model = model_of(crew, slot)
    layer, piece = stage // slot[WIDTH], stage % slot[WIDTH]
    if is_head(model, slot, stage):
        kind = HEAD_STAGE
    elif is_ffn(slot, stage):
        kind = FFN_STAGE
    elif slot[SPREAD] != 0:
        kind = MLA_SPREAD_STAGE if layer_at(model, layer)[LATENT] else GQA_SPREAD_STAGE
    else:
        kind = MLA_STAGE if layer_at(model, layer)[LATENT] else GQA_STAGE
    arguments = (crew[SHARED], own, crew[ROOM], mine, address_of(model), slot[BODY], layer, part, piece)
    call_entry(words(crew[STAGES], kind + 1)[kind], arguments)
    if kind == HEAD_STAGE:
        yield_core()


@kernel
def lead(crew_address, own, mine, table, tasks):
    """The leader's loop. Returns True when told to stop, and False after ``tasks`` tasks."""
    crew = words(crew_address, CREW_WORDS)
    team = crew[TEAM_TABLE] + 8 * TEAM_WORDS * crew[NUMBER]
    idle = 0
    while load_acquire(crew[CONTROL] + 8 * STOP) == 0:
        heard = load_acquire(team + 8 * BELL)
        time = now()
        column = choose_task(crew_address, table, time)
        if column != NOTHING:
            run_task(crew_address, own, mine, table, column, time)
            fetch_add(team + 8 * BEATS, 1)
            idle = 0
            tasks -= 1
            if tasks == 0:
                return False
            continue
        if idle == 0:
            idle = time
        if not wait_a_little(idle):
            await_bell(team, heard, SLEEP_FOR)
            fetch_add(team + 8 * BEATS, 1)
            idle = 0
    words(own, OWN_WORDS)[THREADS] = words(crew[ATTENDANCE], ALL + 1)[ALL]
    call(team, own, NO_SLOT, 0, 0)
    return True


@kernel
def follow(crew_address, own, mine, taken, tasks, patience):
    """A member's loop, from task number ``taken`` on. Returns the number of the last one after ``tasks`` of
    them, SENT_HOME, or NOT_CALLED, from before its first one only."""
    crew = words(crew_address, CREW_WORDS)
    team = crew[TEAM_TABLE] + 8 * TEAM_WORDS * crew[NUMBER]
    before = taken
    for _ in range(tasks):
        number = await_call(team, own, taken, patience)
        if number == NOT_CALLED:
            return NOT_CALLED if taken == before else taken
        taken = number
        task = words(team, TASK_PART + 1)
        if task[TASK_SLOT] == NO_SLOT:
            return SENT_HOME
        run_stage(crew_address, own, mine, task[TASK_SLOT], task[TASK_STAGE], task[TASK_PART])
    return taken


@kernel
def run_task(crew_address, own, mine, table, column, time):
    """Leader: run one task with the team, and do what follows from it."""
    crew = words(crew_address, CREW_WORDS)
    team = crew[TEAM_TABLE] + 8 * TEAM_WORDS * crew[NUMBER]
    index, part = table[INDEX, column], table[PART, column]
    address = slot_at(crew, index)
    slot = words(address, SLOT_WORDS)
    model = model_of(crew, slot)
    position = load_acquire(address + 8 * POSITION)
    stage = stage_of(model, slot, position)
    note_begin(crew_address, table, column, time)
    if stage == 0:
        begin_pass(slot[BODY])
    if stage % slot[WIDTH] == 0 and rows_that_go_on(slot[BODY]) == 0:
        _end(crew, index)
        return
    head = is_head(model, slot, stage)
    if not head or body_at(slot[BODY])[PASS_CHOOSERS] > 0:
        call(team, own, index, stage, part)
        run_stage(crew_address, own, mine, index, stage, part)
    end = now()
    if is_ffn(slot, stage):
        _add_time(address, FFN_TIME, FFN_TASKS, end - time, 1)
    elif not head and slot[TEAM] == crew[NUMBER]:
        begun = not continues_half(slot, stage)
        _add_time(address, ATTENTION_TIME, ATTENTION_TASKS, end - time, begun)
    review(crew[ATTENDANCE], crew[SHARED], own, end, end - time)
    _complete(crew, index, position, stage)


@inline
def _add_time(slot, total, tasks, span, count):
    """Add to the time of a half. Of an attention half in pieces, that at home counts."""
    fetch_add(slot + 8 * total, span)
    fetch_add(slot + 8 * tasks, count)


@kernel
def _complete(crew, index, position, stage):
    """A team is done with its part of a stage: whoever is the last says what comes next."""
    address = slot_at(crew, index)
    slot = words(address, SLOT_WORDS)
    model = model_of(crew, slot)
    if not is_last_part(address, parts_of(crew, slot, stage)):
        return
    steps_stage = (position & ((1 << STAGE_BITS) - 1)) + 1
    following = stage_of(model, slot, steps_stage)
    if not continues_half(slot, following):
        slot[CHUNK_END] = 0
    if is_head(model, slot, stage):
        if not _end_pass(crew, index):
            _end(crew, index)
            return
        slot[START_BY] = now() + slot[INTERVAL]
        in_use = load_acquire(crew[CONTROL] + 8 * SLOTS_IN_USE)
        slot[PASSED] = already_passed(crew[SLOT_TABLE], in_use, slot[PHASE], slot[START_BY])
    elif is_head(model, slot, following) and not slot[HAS_HEAD]:
        _end(crew, index)
        return
    teams = teams_of(crew, slot, following)
    hand_over(address, steps_stage)
    _ring(crew, teams)


@inline
def _ring(crew, teams):
    """Let the other ones of these teams look for a stage. The slot may be another micro-batch's by now."""
    team = 0
    while teams >> team != 0:
        if teams >> team & 1 and team != crew[NUMBER]:
            ring_bell(crew[TEAM_TABLE] + 8 * TEAM_WORDS * team)
        team += 1


@kernel
def _end_pass(crew, index):
    """Every row that chose has its token: send them. Returns whether there is another pass.

    A request's last token goes by the engine's thread, which says why it was the last, and so do all tokens
    of a row after one that the pipe did not take: none overtakes another.
    """
    slot = words(slot_at(crew, index), SLOT_WORDS)
    body = body_at(slot[BODY])
    team, ring = crew[TEAM_TABLE] + 8 * TEAM_WORDS * crew[NUMBER], crew[RING]
    choosers, row_of = words(body[CHOOSERS], body[PASS_CHOOSERS]), words(body[ROW_OF], body[PASS_QUERIES])
    numbers = words(body[ROW_NUMBERS], body[PASS_ROWS])
    for chooser in choosers:
        number = numbers[row_of[chooser]]
        row = row_at(body, number)
        if row[NEXT] < 0:
            slot[ERROR] = 1
            return False
    all_delivered = True
    for chooser in choosers:
        number = numbers[row_of[chooser]]
        row = row_at(body, number)
        end_row(row)
        if load_acquire(address_of(row) + 8 * ALIVE) == 0:
            continue
        if row[DONE] == ENDED:
            row[PIPED] = NO_REQUEST
        token, made = row[NEXT], row[MADE]
        if not send_event(crew[CONTROL], team, ring, TOKEN_EVENT, row[PIPED], token, index, number, made):
            row[PIPED] = NO_REQUEST
            all_delivered = False
    slot[STEPS] -= 1
    if slot[STEPS] == 0 or load_acquire(address_of(slot) + 8 * RECALLED) != 0:
        return False
    if rows_that_go_on(slot[BODY]) == 0:
        return False
    if not all_delivered:
        ring_news(crew[CONTROL])
    return True


@kernel
def _end(crew, index):
    """The micro-batch is over: say so, and leave the slot."""
    address = slot_at(crew, index)
    slot = words(address, SLOT_WORDS)
    team, ring = crew[TEAM_TABLE] + 8 * TEAM_WORDS * crew[NUMBER], crew[RING]
    attention = slot[ATTENTION_TIME] // max(1, slot[ATTENTION_TASKS])
    ffn = slot[FFN_TIME] // max(1, slot[FFN_TASKS])
    slot[CHUNK_END] = 0
    send_event(crew[CONTROL], team, ring, RETIRED_EVENT, NO_REQUEST, attention, index, slot[ERROR], ffn)
    retire(address)
    ring_news(crew[CONTROL])
