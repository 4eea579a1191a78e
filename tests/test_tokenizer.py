"""Tokenizers against Hugging Face, llama.cpp, sentencepiece and plain references, and with damaged metadata."""

from __future__ import annotations

import ctypes
import io
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece

import tokenizer_data as data
from peers import llama_cpp
from phi4edge.errors import BundleError, InputError
from phi4edge.tokenizer import Tokenizer

PRES = ("gpt-4o", "llama-bpe", "gpt-2", "smollm", "default")


@dataclass(frozen=True)
class Segment:
    text: str
    special: bool


@cache
def phi4() -> Tokenizer:
    return Tokenizer.from_metadata(data.phi4_metadata())


@cache
def phi4_hf() -> Any:
    return data.hf_tokenizer(data.phi4_metadata())


@cache
def phi4_hf_with_control_tokens() -> Any:
    tokenizer = data.hf_tokenizer(data.phi4_metadata())
    data.add_phi4_control_tokens(tokenizer)
    return tokenizer


@cache
def smollm2(pre: str = "smollm") -> Tokenizer:
    return Tokenizer.from_metadata({**data.smollm2_metadata(), "tokenizer.ggml.pre": pre})


@cache
def smollm2_hf(pre: str = "smollm") -> Any:
    return data.hf_tokenizer(data.smollm2_metadata(), pre, ignore_merges=pre == "llama-bpe")


def hf_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def texts_of(seed: int, n_texts: int) -> list[str]:
    source = random.Random(seed)
    return [data.random_text(source) for _ in range(n_texts)]


# ---- Phi-4


@pytest.mark.parametrize(("text", "ids"), data.PHI4_VECTORS, ids=lambda value: str(value)[:24])
def test_phi4_gives_the_published_ids(text: str, ids: str) -> None:
    assert phi4().encode(text, special=True) == [int(token) for token in ids.split()]


def test_phi4_equals_hugging_face_on_random_texts() -> None:
    texts = texts_of(1, 3000)
    expected = phi4_hf().encode_batch(texts, add_special_tokens=False)
    for text, encoding in zip(texts, expected, strict=True):
        ids = phi4().encode(text)
        assert ids == encoding.ids, repr(text)
        assert phi4().decode(ids) == text


def test_phi4_prompts_equal_hugging_face_with_special_tokens_between() -> None:
    source = random.Random(2)
    for _ in range(300):
        parts = source.choices([*data.PHI4_CONTROL.values(), " ", "\n", " hi", "ok ", data.random_text(source)], k=8)
        prompt = "".join(parts)
        ids = phi4().encode(prompt, special=True)
        assert ids == hf_ids(phi4_hf_with_control_tokens(), prompt), repr(prompt)


@pytest.mark.parametrize("prompt", ["<|user|>\nhi", "<|user|>hi", "<|user|>  \n hi"])
def test_phi4_drops_whitespace_behind_a_role(prompt: str) -> None:
    assert phi4().encode(prompt, special=True) == [200021, 3686]


def test_phi4_keeps_whitespace_behind_other_tokens_and_in_typed_text() -> None:
    assert phi4().encode("<|endoftext10|> hi", special=True) == [200010, *phi4().encode(" hi")]
    typed = phi4().encode("<|user|> hi")
    assert 200021 not in typed
    assert phi4().decode(typed) == "<|user|> hi"


def test_segments_are_encoded_as_one_text_but_typed_special_tokens_stay_text() -> None:
    typed = "  one<|end|>\n"
    segments = [Segment("<|user|>", True), Segment(typed, False), Segment("<|end|>\n<|assistant|>", True)]
    ids = phi4().encode_segments(segments)
    assert ids == [200021, *phi4().encode("one<|end|>\n"), 200020, 200019]
    plain = [Segment("<|user|>hel", True), Segment("lo wor", False), Segment("ld<|end|>", True)]
    assert phi4().encode_segments(plain) == [200021, *phi4().encode("hello world"), 200020]


def test_phi4_stops_where_llama_cpp_does_and_adds_no_bos() -> None:
    assert phi4().stop_ids == {199999, 200020}
    assert phi4().bos_id == phi4().eos_id == 199999
    assert not phi4().add_bos
    assert phi4().encode("x", add_bos=True) == [199999, 87]
    assert phi4().encode("<|endoftext|>x", special=True, add_bos=True) == [199999, 87]
    assert set(phi4().special_tokens.values()) == set(data.PHI4_CONTROL)


def test_control_tokens_are_decoded_only_on_request() -> None:
    ids = [200021, *phi4().encode("hi"), 200020, 200005]
    assert phi4().decode(ids) == "hi"
    assert phi4().decode(ids, special=True) == "<|user|>hi<|end|>"
    assert phi4().token_text(200021) == "<|user|>"


def test_the_vocabulary_of_200000_tokens_loads_fast() -> None:
    metadata = data.phi4_metadata()
    start = time.process_time()
    Tokenizer.from_metadata(metadata)
    assert time.process_time() - start < 4  # about 0.8 s on an idle machine


# ---- other byte-level vocabularies


@pytest.mark.parametrize("pre", PRES)
def test_real_gguf_vocabulary_equals_hugging_face_under_every_pretokenizer(pre: str) -> None:
    texts = texts_of(3, 1000)
    expected = smollm2_hf(pre).encode_batch(texts, add_special_tokens=False)
    for text, encoding in zip(texts, expected, strict=True):
        assert smollm2(pre).encode(text) == encoding.ids, repr(text)


def test_llama_3_pieces_equal_hugging_face_with_the_vocabulary_that_llama_3_extends() -> None:
    metadata = data.ranks_metadata("cl100k_base", "llama-bpe")
    tokenizer, texts = Tokenizer.from_metadata(metadata), texts_of(4, 1000)
    expected = data.hf_tokenizer(metadata, ignore_merges=True).encode_batch(texts, add_special_tokens=False)
    for text, encoding in zip(texts, expected, strict=True):
        assert tokenizer.encode(text) == encoding.ids, repr(text)
        assert tokenizer.decode(encoding.ids) == text


class LlamaCppVocabulary:
    """The tokenizer of llama.cpp, from a file with nothing but the tokenizer."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        _write_vocabulary(metadata, path)
        self._api = llama_cpp()
        params = self._api.llama_model_default_params()
        params.vocab_only = True
        self._model = self._api.llama_model_load_from_file(str(path).encode(), params)
        self._vocab = self._api.llama_model_get_vocab(self._model)

    def encode(self, text: str) -> list[int]:
        content = text.encode()
        ids = (ctypes.c_int32 * (len(content) + 8))()
        return list(ids[: self._api.llama_tokenize(self._vocab, content, len(content), ids, len(ids), False, False)])

    def token_bytes(self, token: int, *, special: bool) -> bytes:
        piece = (ctypes.c_char * 1024)()
        n_bytes = self._api.llama_token_to_piece(self._vocab, token, piece, 1024, 0, special)
        return ctypes.string_at(piece, n_bytes)

    def stop_ids(self) -> set[int]:
        n_vocab = self._api.llama_vocab_n_tokens(self._vocab)
        return {token for token in range(n_vocab) if self._api.llama_vocab_is_eog(self._vocab, token)}


def _write_vocabulary(metadata: Mapping[str, Any], path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    elements = {"token_type": gguf.GGUFValueType.INT32, "scores": gguf.GGUFValueType.FLOAT32}
    for key, value in metadata.items():
        if isinstance(value, list):
            element = elements.get(key.rpartition(".")[2], gguf.GGUFValueType.STRING)
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=element)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_real_gguf_vocabulary_equals_llama_cpp(tmp_path: Path) -> None:
    ours, theirs = smollm2(), LlamaCppVocabulary(data.smollm2_metadata(), tmp_path / "vocab.gguf")
    for text in texts_of(5, 1000):
        if all(char not in text for char in data.NOT_IN_SMOLLM2):  # there, llama.cpp leaves gaps in the bytes
            assert ours.encode(text) == theirs.encode(text), repr(text)
    for special in (False, True):
        for token in range(ours.n_vocab):
            assert ours.token_bytes(token, special=special) == theirs.token_bytes(token, special=special)
    assert ours.stop_ids == theirs.stop_ids()


# ---- long runs


@pytest.mark.parametrize("unit", data.UNITS)
def test_T1_one_megabyte_of_one_character_is_fast_and_exact(unit: str) -> None:
    text = data.UNITS[unit] * (1_000_000 // len(data.UNITS[unit].encode()))
    start = time.process_time()
    ids = phi4().encode(text)
    assert time.process_time() - start < 10  # at most 0.6 s on an idle machine; quadratic time would be minutes
    assert phi4().decode(ids) == text
    assert ids == hf_ids(phi4_hf(), text)


@pytest.mark.parametrize("pre", PRES)
@pytest.mark.parametrize("unit", data.UNITS)
def test_T1_long_runs_between_other_text_equal_hugging_face(unit: str, pre: str) -> None:
    run = data.UNITS[unit] * 10_000
    for text in (f"word{run}word", f".{run}.", f"\n{run}7", run + "\nx", f"{run}\u0301{run}`"):
        assert smollm2(pre).encode(text) == hf_ids(smollm2_hf(pre), text)


# ---- merges


def _named(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token_text(token) for token in tokenizer.encode(text)]


def test_a_token_that_merges_do_not_reach_is_not_used() -> None:
    merges = ["b c", "a b", "ab c"]  # tiktoken, which has ranks and no pairs, would join a and bc
    tokenizer = Tokenizer.from_metadata(data.small_bpe(merges))
    assert _named(tokenizer, "abc") == ["a", "bc"] == data.merge_naively("abc", merges)


def test_a_piece_that_is_a_token_is_taken_whole_where_the_model_ignores_merges() -> None:
    tokenizer = Tokenizer.from_metadata(data.small_bpe(["b c", "a b", "ab c"], pre="llama-bpe"))
    assert _named(tokenizer, "abc") == ["abc"]
    assert _named(tokenizer, "xabc") == ["x", "a", "bc"]


@pytest.mark.parametrize("seed", range(8))
def test_random_merges_in_any_order_equal_the_definition(seed: int) -> None:
    source = random.Random(seed)
    ways = set()
    for _ in range(60):
        tokens = list("abc"[: source.choice((1, 2, 3))])
        letters, merges = tokens[:], []
        for _ in range(source.randrange(1, 14)):
            left, right = source.choices(tokens, k=2)
            if len(left + right) <= 12 and f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
                tokens.append(left + right)
        if source.random() < 0.3:
            source.shuffle(merges)
        pre = source.choice(("gpt-2", "llama-bpe"))
        tokenizer = Tokenizer.from_metadata(data.small_bpe(merges, pre=pre))
        ways.add(tokenizer.is_fast)
        for _ in range(20):
            text = "".join(source.choices(letters, k=source.randrange(1, 20)))
            whole = pre == "llama-bpe" and text in tokens
            assert _named(tokenizer, text) == ([text] if whole else data.merge_naively(text, merges)), merges
    assert ways == {True, False}


def test_bytes_that_the_vocabulary_lacks_are_left_out_as_hugging_face_does() -> None:
    tokens = [char for char in data.CHARS if char != data.CHARS[4]]
    metadata = data.bpe_metadata([*tokens, ".."], [". ."])
    assert _named(Tokenizer.from_metadata(metadata), ".\x04.a\x04") == ["..", "a"]


def test_a_vocabulary_of_one_token_works_without_special_ids() -> None:
    tokenizer = Tokenizer.from_metadata(data.bpe_metadata(["a"], []))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (None, None, frozenset())
    assert tokenizer.encode("ab a", add_bos=True) == [0, 0]


# ---- unusual text


@pytest.mark.parametrize(
    "text", ["", "\x00a\x00", "\ufeffa", "\u202eabc\u202c\u200f", "\U0010ffff", "\ufffd", "\x1c \x85"]
)
def test_T2_unusual_characters_survive(text: str) -> None:
    tokenizer = Tokenizer.from_metadata(data.small_bpe(["a b"]))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("text", "decoded"), [("a\ud800b", "a\ufffdb"), ("\udcff", "\ufffd"), ("\ud83d\ude00", "\U0001f600")]
)
def test_T2_lone_surrogates_become_replacement_characters(text: str, decoded: str) -> None:
    tokenizer = Tokenizer.from_metadata(data.small_bpe(["a b"]))
    assert tokenizer.decode(tokenizer.encode(text)) == decoded


def test_streamed_text_has_only_whole_characters_and_equals_decode() -> None:
    tokenizer = Tokenizer.from_metadata(data.small_bpe(["a b"]))
    text = "ab\u00e9\u597d\U0001f600\u0301."
    decoder = tokenizer.stream_decoder()
    pushed = [decoder.push(token) for token in tokenizer.encode(text)]
    assert "".join(pushed) == text
    assert "\ufffd" not in "".join(pushed)
    assert decoder.flush() == ""


def test_an_unfinished_or_impossible_character_becomes_a_replacement_character() -> None:
    tokenizer = Tokenizer.from_metadata(data.small_bpe([]))
    decoder = tokenizer.stream_decoder()
    ids = [tokenizer.encode("x")[0], *tokenizer.encode("\U0001f600")[:3]]
    assert [decoder.push(token) for token in ids] == ["x", "", "", ""]
    assert decoder.flush() == "\ufffd"
    lone = tokenizer.encode("\u00e9")[1]
    assert decoder.push(lone) == tokenizer.decode([lone]) == "\ufffd"


def test_ids_outside_the_vocabulary_are_input_errors() -> None:
    tokenizer = Tokenizer.from_metadata(data.small_bpe([]))
    for token in (-1, 256, 1 << 40):
        with pytest.raises(InputError, match="does not exist"):
            tokenizer.decode([token])


# ---- special tokens


def test_user_defined_tokens_match_in_any_text_and_control_tokens_on_request() -> None:
    types = [data.NORMAL] * 256 + [data.USER_DEFINED, data.USER_DEFINED, data.CONTROL]
    metadata = data.small_bpe([], ["<x>", "<x>>", "<end>"], token_type=types)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("<x><x>>")[-2:] == [256, 257]
    assert 258 not in tokenizer.encode("<x><end>")
    assert tokenizer.encode("<x><end>", special=True) == [256, 258]
    assert tokenizer.decode([256, 258]) == "<x>"
    assert tokenizer.special_tokens == {"<end>": 258}


def test_stop_tokens_come_from_keys_and_from_texts_of_control_tokens() -> None:
    metadata = data.small_bpe(["< /"], ["<|im_end|>", "<|eot_id|>", "<other>", "<mine>"])
    tokenizer = Tokenizer.from_metadata({**metadata, "tokenizer.ggml.eot_token_id": 260})
    assert tokenizer.stop_ids == {257, 258, 260}
    metadata["tokenizer.ggml.token_type"] = [data.NORMAL] * 261
    assert Tokenizer.from_metadata(metadata).stop_ids == frozenset()


def test_bos_is_added_as_the_file_says_or_as_the_family_does() -> None:
    keys: dict[str, Any] = {"extra": ["<bos>"], "bos_token_id": 256}
    assert Tokenizer.from_metadata(data.small_bpe([], pre="llama-bpe", **keys)).encode("a")[0] == 256
    assert Tokenizer.from_metadata(data.small_bpe([], pre="gpt-2", **keys)).encode("a") == [ord("a")]
    assert Tokenizer.from_metadata(data.small_bpe([], **keys, add_bos_token=True)).encode("a")[0] == 256
    assert Tokenizer.from_metadata(data.small_bpe([], **keys, add_bos_token=True)).encode("a", add_bos=False) == [97]


def test_special_ids_are_control_tokens_in_files_without_token_types() -> None:
    metadata = data.small_bpe([], ["<eos>"], eos_token_id=256, token_type=None)
    assert Tokenizer.from_metadata(metadata).special_tokens == {"<eos>": 256}


# ---- sentencepiece


@cache
def spm() -> tuple[Tokenizer, Any, dict[str, Any]]:
    """A small model of sentencepiece, trained here: as a GGUF tokenizer, as the original, and the metadata."""
    source = random.Random(6)
    words = ["".join(source.choices("etaoinshrdlucmf", k=source.randrange(1, 9))) for _ in range(400)]
    words += ["\u65e5\u672c\u8a9e", "\u00fcber", "na\u00efve", "1234", "...", "--"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(source.choices(words, k=12)) for _ in range(800)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=800,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        control_symbols=["<|end|>"],
        user_defined_symbols=["<|user|>"],
        minloglevel=2,
    )
    original = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(original.vocab_size())
    metadata = {
        "model": "llama",
        "tokens": [original.id_to_piece(token) for token in ids],
        "scores": [original.get_score(token) for token in ids],
        "token_type": [_spm_type(original, token) for token in ids],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return Tokenizer.from_metadata(metadata), original, metadata


def _spm_type(model: Any, token: int) -> int:
    if model.id_to_piece(token) == "<|user|>":
        return data.USER_DEFINED
    kinds = {
        data.UNKNOWN: model.is_unknown(token),
        data.CONTROL: model.is_control(token),
        data.BYTE: model.is_byte(token),
        data.UNUSED: model.is_unused(token),
    }
    return next((kind for kind, holds in kinds.items() if holds), data.NORMAL)


def test_a_model_rebuilt_from_gguf_equals_the_original_of_sentencepiece() -> None:
    tokenizer, original, _ = spm()
    source = random.Random(7)
    texts = [*texts_of(8, 1000), *("".join(source.choices("etaoin .", k=60)) for _ in range(500))]
    for text in texts:
        ids = tokenizer.encode(text, add_bos=False)
        assert ids == original.encode(text), repr(text)
        assert tokenizer.decode(ids) == text == original.decode(ids)
        decoder = tokenizer.stream_decoder()
        assert "".join(map(decoder.push, ids)) + decoder.flush() == text


def test_a_model_of_sentencepiece_equals_llama_cpp(tmp_path: Path) -> None:
    ours, _, metadata = spm()
    theirs = LlamaCppVocabulary(metadata, tmp_path / "vocab.gguf")
    for text in [*texts_of(9, 1000), "<|user|> hi<|user|>", "<|end|> typed"]:
        assert ours.encode(text, add_bos=False) == theirs.encode(text), repr(text)
    for token in range(1, ours.n_vocab):  # 0 is <unk>, for which we show U+FFFD
        assert ours.token_bytes(token) == theirs.token_bytes(token, special=False)
    assert ours.stop_ids == theirs.stop_ids()


@pytest.mark.parametrize("unit", data.UNITS)
def test_T1_one_megabyte_through_sentencepiece_is_fast(unit: str) -> None:
    text = data.UNITS[unit] * (1_000_000 // len(data.UNITS[unit].encode()))
    start = time.process_time()
    ids = spm()[0].encode(text, add_bos=False)
    assert time.process_time() - start < 10
    assert spm()[0].decode(ids) == text


def test_sentencepiece_adds_bos_and_keeps_the_space_of_a_text_that_goes_on() -> None:
    tokenizer = spm()[0]
    ids = tokenizer.encode("the")
    assert ids[0] == tokenizer.bos_id
    decoder = tokenizer.stream_decoder(continues=True)
    assert "".join(map(decoder.push, ids)) == " the"
    without = Tokenizer.from_metadata({**spm()[2], "tokenizer.ggml.add_space_prefix": False})
    assert without.decode(without.encode(" the")) == " the"
    assert without.encode("the") != ids


def test_sentencepiece_without_unknown_or_byte_tokens_leaves_out_what_it_does_not_know() -> None:
    tokens = ["\u2581", "a", "", "a", "b\udcff", "ab"]
    metadata = {"model": "llama", "tokens": tokens, "scores": [float(-at) for at in range(6)], "token_type": [1] * 6}
    tokenizer = Tokenizer.from_metadata({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    assert tokenizer.encode("a\u597da") == [0, 1, 1]
    assert tokenizer.token_bytes(4) == b"b\xff"


# ---- damaged metadata


def _damage(**keys: Any) -> dict[str, Any]:
    return data.small_bpe(["a b"]) | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


G19_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({}, "model"),
    "unknown model": (_damage(model="rwkv"), "model"),
    "model of another type": (_damage(model=3), "model"),
    "unknown pre": (_damage(pre="falcon"), "pre"),
    "no tokens": (_damage(tokens=None), "tokens"),
    "empty vocabulary": (_damage(tokens=[]), "tokens"),
    "tokens that are numbers": (_damage(tokens=[1, 2]), "tokens"),
    "tokens that are a string": (_damage(tokens="abc"), "tokens"),
    "huge token": (_damage(tokens=["x" * (1 << 20)] * 257), "tokens"),
    "types too short": (_damage(token_type=[1] * 256), "token_type"),
    "types that are floats": (_damage(token_type=[1.0] * 257), "token_type"),
    "types that are booleans": (_damage(token_type=[True] * 257), "token_type"),
    "type unknown": (_damage(token_type=[9] * 257), "token_type"),
    "scores too short": (_damage(scores=[0.0]), "scores"),
    "scores that are strings": (_damage(scores=["0"] * 257), "scores"),
    "scores that are integers": (_damage(scores=[0] * 257), "scores"),
    "no merges": (_damage(merges=None), "merges"),
    "merge of an unknown token": (_damage(merges=["ab zz"]), "merges"),
    "merge to an unknown token": (_damage(merges=["a c"]), "merges"),
    "merge of one token": (_damage(merges=["ab"]), "merges"),
    "merge of three tokens": (_damage(merges=["a b", "a b c"]), "merges"),
    "merges that are numbers": (_damage(merges=[1]), "merges"),
    "bos outside": (_damage(bos_token_id=257), "bos_token_id"),
    "eos negative": (_damage(eos_token_id=-1), "eos_token_id"),
    "eot outside": (_damage(eot_token_id=1 << 31), "eot_token_id"),
    "padding outside": (_damage(padding_token_id=1 << 31), "padding_token_id"),
    "eos a string": (_damage(eos_token_id="</s>"), "eos_token_id"),
    "eos a boolean": (_damage(eos_token_id=True), "eos_token_id"),
    "add_bos a number": (_damage(add_bos_token=1), "add_bos_token"),
    "byte of two digits and a sign": (_damage(tokens=["<0x-1>"] * 257, token_type=[6] * 257), "tokens"),
    "spm without scores": (_damage(model="llama"), "scores"),
    "spm with NaN": (_damage(model="llama", scores=[float("nan")] * 257), "scores"),
    "spm with infinity": (_damage(model="llama", scores=[float("inf")] * 257), "scores"),
    "spm with a bad byte": (
        _damage(model="llama", scores=[0.0] * 257, tokens=["<0x-1>"] * 257, token_type=[6] * 257),
        "tokens",
    ),
    "spm with unknown normalization": (
        _damage(model="llama", scores=[0.0] * 257, precompiled_charsmap=[1]),
        "precompiled_charsmap",
    ),
}


@pytest.mark.parametrize("case", G19_CASES)
def test_G19_damaged_metadata_is_a_bundle_error_that_names_the_key(case: str) -> None:
    metadata, key = G19_CASES[case]
    with pytest.raises(BundleError) as caught:
        Tokenizer.from_metadata(metadata, "model.gguf")
    assert caught.value.field == f"tokenizer.ggml.{key}"
    assert caught.value.path == "model.gguf"
    assert len(str(caught.value)) < 300


def test_an_unknown_pretokenizer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BundleError, match="gpt-4o, llama-bpe, gpt-2, smollm, default"):
        Tokenizer.from_metadata(_damage(pre="falcon"))
