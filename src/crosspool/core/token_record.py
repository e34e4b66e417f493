"""A token as it is written into a pipe the moment it is made (Executor.stream_to).

int64 in the machine's order: TOKEN_RECORD, the request's id, the token's id. A pipe takes so few bytes whole
or not at all, from any number of writers (PIPE_BUF of pipe(7)).
"""

TOKEN_RECORD = 1
RECORD_WORDS = 3
