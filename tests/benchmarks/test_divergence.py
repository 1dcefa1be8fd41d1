"""NLL and KL against their definitions, and the stored log-probabilities of full precision."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from benchmarks.divergence import (
    FLOAT32_VOCABULARY,
    ItemKey,
    ReferenceReader,
    ReferenceRecorder,
    kl_per_token,
    nll_per_token,
)

KEY = ItemKey("demo_textvqa", "7/b")


def log_probs(seed: int, tokens: int = 3, vocabulary: int = 11, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(tokens, vocabulary, generator=generator)).log_softmax(-1)


def test_nll_and_kl_by_hand() -> None:
    p = torch.tensor([[0.5, 0.5], [1.0 - 1e-30, 1e-30]]).log()
    q = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    assert nll_per_token(q, [0, 1]) == pytest.approx((math.log(4) + math.log(2)) / 2)
    expected = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75) + math.log(2)) / 2
    assert kl_per_token(p, q) == pytest.approx(expected, rel=1e-6)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_kl_is_zero_for_equal_distributions_and_never_negative(a: int, b: int) -> None:
    assert kl_per_token(log_probs(a), log_probs(a)) == 0
    assert kl_per_token(log_probs(a), log_probs(b)) >= -1e-7


def test_reader_compares_with_the_recorded_log_probabilities(tmp_path: Path) -> None:
    full, variant = log_probs(0), log_probs(1)
    recorded = ReferenceRecorder(tmp_path).measure({KEY: ([1, 2, 3], full)})
    assert recorded[KEY].kl == 0
    assert recorded[KEY].nll == pytest.approx(nll_per_token(full, [1, 2, 3]))
    reader = ReferenceReader(tmp_path)
    assert reader.wants(KEY)
    assert not reader.wants(ItemKey("demo_textvqa", "8"))
    measured = reader.measure({KEY: ([1, 2, 3], variant)})[KEY]
    assert measured.n_tokens == 3
    assert measured.kl == pytest.approx(kl_per_token(full, variant))
    assert measured.nll == pytest.approx(nll_per_token(variant, [1, 2, 3]))


def test_large_vocabularies_are_stored_in_half_precision(tmp_path: Path) -> None:
    vocabulary = FLOAT32_VOCABULARY + 1
    full, variant = log_probs(0, vocabulary=vocabulary), log_probs(1, vocabulary=vocabulary)
    ReferenceRecorder(tmp_path).measure({KEY: ([1, 2, 3], full)})
    assert next(tmp_path.iterdir()).stat().st_size < 2.1 * 3 * vocabulary
    reader = ReferenceReader(tmp_path)
    assert reader.measure({KEY: ([1, 2, 3], variant)})[KEY].kl == pytest.approx(kl_per_token(full, variant), rel=1e-3)
    assert reader.measure({KEY: ([1, 2, 3], full)})[KEY].kl == pytest.approx(0, abs=1e-5)


def test_recorder_continues_after_the_files_of_an_interrupted_run(tmp_path: Path) -> None:
    other = ItemKey("demo_textvqa", "9")
    ReferenceRecorder(tmp_path).measure({KEY: ([1], log_probs(0, 1))})
    ReferenceRecorder(tmp_path).measure({other: ([2], log_probs(1, 1))})
    reader = ReferenceReader(tmp_path)
    assert reader.wants(KEY)
    assert reader.wants(other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-00000.safetensors", "part-00001.safetensors"]


@pytest.mark.parametrize(("tokens", "vocabulary"), [([1, 2, 4], 11), ([1, 2, 3], 12)])
def test_other_tokens_or_vocabulary_are_refused(tmp_path: Path, tokens: list[int], vocabulary: int) -> None:
    ReferenceRecorder(tmp_path).measure({KEY: ([1, 2, 3], log_probs(0))})
    with pytest.raises(ValueError, match="demo_textvqa/7/b: .* evaluate `full` again"):
        ReferenceReader(tmp_path).measure({KEY: (tokens, log_probs(0, vocabulary=vocabulary))})


def test_missing_and_damaged_references_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="evaluate the `full` variant first"):
        ReferenceReader(tmp_path)
    (tmp_path / "part-00000.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="part-00000.safetensors is damaged"):
        ReferenceReader(tmp_path)


def flip(part: Path, value: torch.Tensor) -> None:
    """Flip one bit of a tensor in a file."""
    content = part.read_bytes()
    place = content.index(value.numpy().tobytes()) + 5
    part.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


def test_the_reference_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    answers = {ItemKey("demo_textvqa", str(row)): ([1, 2, 3], log_probs(row)) for row in range(9)}
    for name in ("one", "other"):
        ReferenceRecorder(tmp_path / name).measure(answers)
    one, other = (tmp_path / name / "part-00000.safetensors" for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("metadata", [{"digests": "{"}, {"digests": "[]"}, {}])
def test_a_reference_without_digests_is_damaged(tmp_path: Path, metadata: dict[str, str]) -> None:
    ReferenceRecorder(tmp_path).measure({KEY: ([1, 2, 3], log_probs(0))})
    (part,) = tmp_path.iterdir()
    save_file(load_file(part), part, metadata=metadata)
    with pytest.raises(ValueError, match=r"part-00000\.safetensors: .* of demo_textvqa/7/b are damaged; evaluate"):
        ReferenceReader(tmp_path).measure({KEY: ([1, 2, 3], log_probs(0))})


@pytest.mark.parametrize("damaged", ["part-00000.safetensors", "part-00001.safetensors"])
def test_one_sound_copy_of_an_answer_is_enough(damaged: str, tmp_path: Path) -> None:
    for _ in range(2):
        ReferenceRecorder(tmp_path).measure({KEY: ([1, 2, 3], log_probs(0))})
    flip(tmp_path / damaged, log_probs(0))
    assert ReferenceReader(tmp_path).measure({KEY: ([1, 2, 3], log_probs(0))})[KEY].kl == 0


def test_an_answer_that_the_reference_lost_is_not_left_out_silently(tmp_path: Path) -> None:
    ReferenceRecorder(tmp_path).measure({KEY: ([1, 2, 3], log_probs(0))})
    (part,) = tmp_path.iterdir()
    content = part.read_bytes()
    part.write_bytes(content.replace(f'"{KEY}/log_p"'.encode(), f'"{KEY}/log_q"'.encode()))
    with pytest.raises(ValueError, match=r"part-00000\.safetensors: holds no log-probabilities of demo_textvqa/7/b"):
        ReferenceReader(tmp_path)


def test_a_flipped_bit_of_the_reference_is_refused_by_item(tmp_path: Path) -> None:
    """Other items of the same file are compared as before."""
    other = ItemKey("demo_textvqa", "9")
    ReferenceRecorder(tmp_path).measure({KEY: ([1, 2, 3], log_probs(0)), other: ([2], log_probs(1, 1))})
    (part,) = tmp_path.iterdir()
    flip(part, log_probs(0))
    reader = ReferenceReader(tmp_path)
    assert reader.measure({other: ([2], log_probs(1, 1))})[other].kl == 0
    with pytest.raises(ValueError, match=r"part-00000\.safetensors: .* of demo_textvqa/7/b are damaged; evaluate"):
        reader.measure({KEY: ([1, 2, 3], log_probs(1))})
