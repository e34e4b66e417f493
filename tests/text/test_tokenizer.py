"""Loading and using a folder's tokenizer, against the tokenizers library and transformers."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from crosspool.core.errors import ModelLoadError
from crosspool.text.piece_decoder import BYTE_LEVEL_ALPHABET, PieceDecoder, piece_decoder
from crosspool.text.tokenizer import load_tokenizer
from helpers_tokenizers import BOS, EOS, byte_fallback, byte_level, save

pytestmark = pytest.mark.unit

MAKERS = {"byte_level": byte_level, "byte_fallback": byte_fallback}


@pytest.fixture(scope="module", params=list(MAKERS))
def pair(request, tmp_path_factory):
    """The library's tokenizer and ours."""
    library = MAKERS[request.param]()
    return library, load_tokenizer(save(library, tmp_path_factory.mktemp(request.param)))


@given(text=st.text(max_size=40))
def test_encodes_as_the_library_and_decodes_what_it_encoded(pair, text):
    library, ours = pair
    ids = ours.encode(text, add_special_tokens=True)
    assert ids == library.encode(text).ids
    assert ours.decode(ids, skip_special_tokens=True) == library.decode(ids)
    assert ours.encode(text, add_special_tokens=False) == library.encode(text, add_special_tokens=False).ids


@given(text=st.text(max_size=40))
def test_no_token_stands_for_more_bytes_than_the_longest(pair, text):
    _, ours = pair
    ids = ours.encode(text, add_special_tokens=False)
    assert len(text.encode()) <= len(ids) * ours.longest_token_bytes


def test_the_longest_token_is_one_of_the_vocabulary(pair):
    _, ours = pair
    assert ours.longest_token_bytes == max(len(ours.token_bytes(i)) for i in range(ours.vocab_size))


@given(data=st.data())
def test_decodes_any_ids_as_the_library(pair, data):
    library, ours = pair
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=40))
    for skip in (True, False):
        theirs = library.decode(ids, skip_special_tokens=skip)
        text = ours.decode(ids, skip_special_tokens=skip)
        # With byte fallback the library gives up a whole run of bytes for one that is wrong; we do not.
        assert text == theirs or (ours.leading_spaces and "\ufffd" in theirs)


def test_byte_fallback_loses_only_the_wrong_bytes(tmp_path):
    tokenizer = load_tokenizer(save(byte_fallback(), tmp_path))
    first_byte = 3
    ids = [first_byte + byte for byte in (*"é".encode(), 0xE6, 0x97, *"ß".encode())]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "é\ufffdß"


def test_the_alphabet_of_byte_level_is_the_librarys():
    assert set(BYTE_LEVEL_ALPHABET) == set(byte_level().get_vocab()) & set(BYTE_LEVEL_ALPHABET)
    assert sorted(BYTE_LEVEL_ALPHABET.values()) == list(range(256))
    assert BYTE_LEVEL_ALPHABET["Ġ"] == 0x20
    assert BYTE_LEVEL_ALPHABET["Ċ"] == 0x0A


def test_special_tokens(tmp_path):
    ours = load_tokenizer(save(byte_level(), tmp_path))
    assert ours.special_tokens == {"bos_token": BOS, "eos_token": EOS}
    assert ours.special_ids == {0, 1}
    assert ours.token_bytes(0) == b"<s>"
    assert ours.token_bytes(2) == b"<|tool call|>"
    assert ours.token_bytes(ours.vocab_size) == b""
    assert ours.token_bytes(-1) == b""
    ids = [0, *ours.encode("Paris", add_special_tokens=False), 2, 1]
    assert ours.decode(ids, skip_special_tokens=True) == "Paris<|tool call|>"
    assert ours.decode(ids, skip_special_tokens=False) == "<s>Paris<|tool call|></s>"


def test_a_token_with_a_role_is_special_though_tokenizer_json_does_not_say_so(tmp_path):
    content = json.loads(byte_level().to_str())
    for token in content["added_tokens"]:
        token["special"] = False
    ours = load_tokenizer(save(Tokenizer.from_str(json.dumps(content)), tmp_path))
    assert ours.special_ids == {0, 1}


def test_roles_come_from_either_file_and_as_objects(tmp_path):
    save(byte_level(), tmp_path, bos_token=None, eos_token={"content": EOS, "special": True})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": BOS, "eos_token": "other"}))
    assert load_tokenizer(tmp_path).special_tokens == {"bos_token": BOS, "eos_token": EOS}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (False, False)),
        ({"add_bos_token": True}, (True, False)),
        ({"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ({"add_eos_token": True}, (False, True)),
        ({"add_bos_token": True, "bos_token": None}, (False, False)),
    ],
)
def test_config_says_whether_bos_and_eos_are_added(tmp_path, config, expected):
    ours = load_tokenizer(save(byte_level(), tmp_path, **config))
    plain = ours.encode("dog", add_special_tokens=False)
    bos, eos = expected
    assert ours.encode("dog", add_special_tokens=True) == [0] * bos + plain + [1] * eos


def test_config_can_take_away_the_bos_of_tokenizer_json(tmp_path):
    folder = save(byte_fallback(), tmp_path)
    assert load_tokenizer(folder).encode("the", add_special_tokens=True)[0] == 1
    save(byte_fallback(), tmp_path, add_bos_token=False)
    assert load_tokenizer(folder).encode("the", add_special_tokens=True)[0] != 1


@pytest.mark.parametrize("bos", ["<b:1>", "$A", "$1", "$", ":"])
def test_a_bos_that_looks_like_a_templates_syntax(tmp_path, bos):
    library = byte_level()
    library.add_special_tokens([bos])
    ours = load_tokenizer(save(library, tmp_path, bos_token=bos, add_bos_token=True))
    plain = library.encode("dog", add_special_tokens=False).ids
    assert ours.encode("dog", add_special_tokens=True) == [library.token_to_id(bos), *plain]


def test_any_failure_of_the_library_names_the_folder(tmp_path, monkeypatch):
    save(byte_level(), tmp_path, add_bos_token=True)

    def refuse(**_):
        raise ValueError("no such template")

    monkeypatch.setattr("crosspool.text.tokenizer.TemplateProcessing", refuse)
    with pytest.raises(ModelLoadError, match="no such template") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_no_truncation_and_no_padding(tmp_path):
    library = byte_level()
    library.enable_truncation(2)
    library.enable_padding(length=8)
    ours = load_tokenizer(save(library, tmp_path))
    text = "brown fox jumps over"
    assert ours.decode(ours.encode(text, add_special_tokens=True), skip_special_tokens=False) == text


def test_a_folder_without_tokenizer(tmp_path):
    with pytest.raises(ModelLoadError, match=r"has no tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 1}', "\0\1\2"])
def test_a_broken_tokenizer_names_the_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json is not a tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "\xff"])
def test_a_broken_config_names_the_file(tmp_path, content):
    save(byte_level(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_a_decoder_that_is_not_piece_by_piece_is_refused(tmp_path):
    library = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    library.decoder = decoders.WordPiece()
    with pytest.raises(ModelLoadError, match="WordPiece") as caught:
        load_tokenizer(save(library, tmp_path))
    assert str(tmp_path) in str(caught.value)
    library.decoder = None
    with pytest.raises(ModelLoadError, match="no decoder"):
        load_tokenizer(save(library, tmp_path))


def test_metaspace_decoder():
    always = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    assert piece_decoder(always) == PieceDecoder((("▁", " "),), leading_spaces=1)
    assert piece_decoder({**always, "prepend_scheme": "never"}).leading_spaces == 0
    old = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": False}
    assert piece_decoder(old).leading_spaces == 0
    assert piece_decoder(always).piece_bytes("▁a▁b") == b" a b"


def test_a_strip_of_each_piece_is_refused():
    with pytest.raises(ModelLoadError, match="Strip"):
        piece_decoder(
            {"type": "Sequence", "decoders": [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
        )


def test_needs_no_torch():
    code = (
        "import sys, crosspool.text.front; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
