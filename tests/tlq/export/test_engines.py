"""What engines run: the table, the refusal before any work, and checkpoints read back."""

from __future__ import annotations

import json
import re
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from support.families import write_tiny
from support.quick_project import ROOT

from tlq import cli, quantize
from tlq.export.engines import ENGINES, check_engine, nearest, serving, table
from tlq.export.quantized import schemes_of
from tlq.models.architectures import architecture_of
from tlq.models.checkpoint import load_config
from tlq.models.families import FAMILIES
from tlq.quantization.formats import SCHEMES, Scheme, get_scheme


def test_every_engine_has_an_answer_with_a_source_for_every_scheme() -> None:
    for engine in ENGINES.values():
        for scheme in SCHEMES.values():
            found = engine.of(scheme)
            assert found.source
            assert found.how or found.runs == "dequantized"
        assert engine.of(get_scheme("w4a16s")).runs != "refused"


def test_the_command_offers_the_engines_that_exist() -> None:
    assert set(cli.ENGINES) == set(ENGINES)
    assert set(cli.SCHEMES) == set(SCHEMES)


def test_the_library_and_the_command_have_the_same_defaults_which_most_engines_run() -> None:
    defaults = signature(quantize).parameters
    words = cli._parser().parse_args(["quantize", "model", "--out", "out"])
    assert (words.recipe, words.scheme) == (defaults["recipe"].default, defaults["scheme"].default)
    assert [name for name, engine in ENGINES.items() if engine.of(get_scheme(words.scheme)).runs == "refused"] == [
        "llama.cpp"
    ]


@pytest.mark.parametrize(
    ("engine", "scheme", "other"),
    [
        ("sglang", "w3a16", "w4a16"),
        ("vllm-cpu", "w2a16", "w4a16"),
        ("sglang", "w4a8", "w4a16s"),
        ("llama.cpp", "w3a16", "q4_1"),
    ],
)
def test_a_scheme_that_an_engine_refuses_is_refused_with_the_nearest(engine: str, scheme: str, other: str) -> None:
    with pytest.raises(ValueError, match=f"does not run {scheme} .*; the nearest scheme that it runs is {other}$"):
        check_engine(engine, get_scheme(scheme))
    assert ENGINES[engine].of(nearest(ENGINES[engine], get_scheme(scheme))).runs != "refused"


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown engine 'ollama'; choose one of vllm, vllm-cpu"):
        check_engine("ollama", get_scheme("w4a16"))


def test_the_worst_part_of_a_mixed_scheme_counts() -> None:
    mixed = Scheme("w8a8", 8, None, True, 8, (("*.layers.0.*", "w4a8"),))
    assert ENGINES["vllm"].of(mixed).runs == "weight only"
    with pytest.raises(ValueError, match="SGLang"):
        check_engine("sglang", mixed)
    ranged = Scheme("w8a8", 8, None, True, 8, (("*.layers.[01].*", "w4a8"),))  # the pattern does not match itself
    assert ENGINES["vllm"].of(ranged).runs == "weight only"


def test_the_command_refuses_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantize", "nowhere", "--recipe", "rtn", "--scheme", "w3a16", "--engine", "sglang"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 1
    assert "does not run w3a16" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["w3a16", "w4a16s", "w4a8", "w8a8"])
def test_the_formats_of_a_checkpoint_are_read_back(
    tiny_checkpoint: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(tiny_checkpoint, tmp_path / "out", [], recipe="rtn", scheme=name)
    assert schemes_of(tmp_path / "out") == [get_scheme(name)]
    assert cli.main(["engines", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == table([get_scheme(name)])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "names no quantization by compressed-tensors"),
        ({"quantization_config": {"quant_method": "gptq"}}, "names no quantization by compressed-tensors"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "has no config_groups"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"a": 7}}}, "cannot be read"),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"a": {"weights": {"type": "float"}}},
                }
            },
            "has weights of type float",
        ),
    ],
)
def test_a_config_that_is_not_ours_is_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=reason):
        schemes_of(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give the folder of a quantized checkpoint"):
        schemes_of(tmp_path)


def test_a_card_names_the_commands_of_the_engines_that_take_it() -> None:
    text = serving(get_scheme("q4_0"), "qwen2_vl", "out")
    assert "vllm serve out\n" in text
    assert "tlq convert out --to gguf --out out-gguf\nllama-server --model out-gguf/model.gguf" in text
    assert "| llama.cpp 2026.10 | native | Q4_0 blocks; rounds activations to 8 bits in blocks of 32 |" in text
    other = serving(get_scheme("q4_0"), "llava_onevision", "out")
    assert "| llama.cpp 2026.10 | refused | no gguf of the family llava_onevision |" in other
    assert "llama-server" not in other
    assert "mlx_vlm.generate" in other
    refused = serving(get_scheme("w3a16"), "qwen2_vl", "out")
    assert "sglang.launch_server" not in refused


def test_a_family_that_differs_in_an_engine_has_the_reason_and_the_flag_in_its_card() -> None:
    text = serving(get_scheme("w4a16s"), "exaone4_5", "out")
    assert "vllm serve out --no-mm-device-do-normalize\n" in text
    assert "computes in bfloat16; 0.32 normalizes the pixels of this family" in text
    assert "--no-mm-device-do-normalize" not in serving(get_scheme("w4a16s"), "qwen2_5_vl", "out")
    for family in ("aya_vision", "cohere2_vision"):
        found = ENGINES["vllm"].of_checkpoint(get_scheme("w4a16s"), family, experts=False)
        assert (found.runs, "logit_scale" in found.how) == ("native", True)
    assert "logit_scale" not in ENGINES["vllm-cpu"].of_checkpoint(get_scheme("w3a16"), "aya_vision", False).how


def test_a_family_that_an_engine_computes_wrongly_is_refused_before_any_work(tmp_path: Path) -> None:
    architecture = architecture_of(load_config(write_tiny("lfm2_vl", tmp_path)))
    with pytest.raises(ValueError, match="does not run this family .*rotates the heads.*; choose another engine"):
        check_engine("vllm-cpu", get_scheme("w4a16s"), architecture)
    assert check_engine("vllm", get_scheme("w4a16s"), architecture).runs == "native"
    assert ENGINES["vllm-cpu"].of_checkpoint(get_scheme("w4a16s"), "lfm2_vl", experts=False).runs == "refused"


def test_the_library_writes_the_engines_into_its_card(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize(tiny_checkpoint, tmp_path / "out", [], recipe="rtn", scheme="w4a16s")
    assert serving(get_scheme("w4a16s"), "qwen2_vl", "out") in (tmp_path / "out/README.md").read_text()


def test_the_page_of_the_documentation_holds_the_table() -> None:
    page = (ROOT / "docs/engines.md").read_text()
    assert table(list(SCHEMES.values())) in page, "run `tlq engines` and put its table into docs/engines.md"


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("minicpmv4_6", "vpm.encoder.layers.0.self_attn.qkv_proj"),
        ("minicpmv4_7", "vit_merger.self_attn.qkv_proj"),
        ("molmo2", "vision_backbone.image_vit.transformer.resblocks.0.attention.wqkv"),
        ("ernie4_5_vl_moe", "vision_model.blocks.0.attn.qkv"),
        ("gemma4_unified", "vision_embedder.patch_dense"),
    ],
)
def test_full_precision_is_stated_in_the_names_of_vllm(family: str, module: str) -> None:
    patterns = [each.removeprefix("re:") for each in FAMILIES[family].ignore if each.startswith("re:")]
    assert any(re.match(pattern, module) for pattern in patterns)  # as vLLM's `should_ignore_layer`
    assert not any(re.match(pattern, "language_model.model.layers.0.self_attn.qkv_proj") for pattern in patterns)
