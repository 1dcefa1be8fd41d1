"""The sections of params.yaml as frozen pydantic models; unknown keys are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    field_validator,
    model_validator,
)

from benchmarks.source import BenchmarkSource
from tlq.export.engines import get_engine
from tlq.importance.token_set import TokenBudget
from tlq.importance.weighting import LossName, Source, Weighting
from tlq.quantization.budget import Budget
from tlq.quantization.formats import Scheme, get_scheme
from tlq.recipes import get_recipe


class Section(BaseModel):
    """A section of params.yaml, or a mapping inside one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, values: Any) -> Any:
        """Refuse true and false where a number belongs; pydantic would take them for 1 and 0."""
        if isinstance(values, Mapping):
            for name, field in cls.model_fields.items():
                if isinstance(values.get(name), bool) and not _takes_truth(field.annotation):
                    raise ValueError(f"{name} is {str(values[name]).lower()}, must be a value of another kind")
        return values


def _takes_truth(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(map(_takes_truth, get_args(annotation)))


class ModelParams(Section):
    """The model to quantize."""

    path: str = Field(description="checkpoint folder; DVC tracks its content")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="dtype of the computation")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as a ``torch.dtype``."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class DemoParams(Section):
    """The demo world: images, questions and benchmarks that stage `demo` renders."""

    seed: int = Field(default=7, ge=0, description="seed of every random choice")


class Columns(Section):
    """Columns of a table of questions."""

    image: str = Field(default="image", description="column of images, one or a list in each row")
    question: str = Field(default="question", description="column of questions; not read where `prompt` is set")
    answer: str = Field(
        default="answer", description="column of answers; of a list of accepted answers the first counts"
    )
    id: str | None = Field(default=None, description="column that identifies a row; null numbers the rows")
    source: str | None = Field(default=None, description="column that names a row's origin; null takes `prepare.path`")


class PrepareParams(Section):
    """The source of the calibration samples."""

    kind: Literal["parquet", "hub", "llava_json"] = Field(
        description="`parquet` and `hub` read a table of questions, `llava_json` conversations with an image folder"
    )
    path: str = Field(description="file; for `hub` a data set's folder as stage `fetch` writes it, or its hub id")
    samples: int = Field(ge=1, description="samples to keep, drawn without replacement")
    seed: int = Field(default=0, ge=0, description="seed of the draw")
    split: str = Field(default="train", description="split of the data set")
    name: str | None = Field(default=None, description="subset of a hub data set that has several")
    revision: str | None = Field(default=None, description="commit of a hub data set that is read from the hub")
    image_root: str | None = Field(default=None, description="folder that image names of `llava_json` are relative to")
    image_prefix: str = Field(
        default="", description="keeps only rows of `llava_json` whose image names begin with it: one source of several"
    )
    columns: Columns = Field(default_factory=lambda: Columns(), description="column names of a table of questions")
    prompt: str | None = Field(
        default=None,
        description="one question for every image of a table that has captions and no questions",
    )
    max_rejected: float = Field(
        default=0.1, ge=0, le=1, description="share of unusable rows, of all rows read, at which the stage stops"
    )

    @model_validator(mode="after")
    def _is_complete(self) -> PrepareParams:
        if self.kind == "llava_json" and self.image_root is None:
            raise ValueError("kind llava_json needs image_root, the folder of its images")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError(f"prompt is {self.prompt!r}, must be a question, or null to read the column of questions")
        return self


class ImportanceParams(Section):
    """The importance score of each token."""

    samples: int = Field(ge=1, description="prepared samples that are scored: the pool that token sets are drawn from")
    batch_size: int = Field(default=8, ge=1, description="samples per batch")
    max_tokens: int = Field(default=4096, ge=1, description="longest sample allowed, in tokens")
    losses: tuple[LossName, ...] = Field(
        default=("answer",),
        min_length=1,
        description="losses whose gradients are scored: `answer` (sources `token` and `modality`), `block` (`block`)",
    )
    block_scheme: str = Field(default="w3a16", description="scheme that the loss `block` rounds weights to")


class CalibsetParams(Section):
    """The token-level calibration set."""

    budget: TokenBudget = Field(description="size of the set and how its tokens are selected")
    source: Source = Field(default="token", description="importance that tokens are selected by")
    weighting: Weighting = Field(default_factory=Weighting, description="map from raw importance to token weights")
    seed: int = Field(default=0, ge=0, description="seed of the draw")


class CalibrateParams(Section):
    """Quantization of one variant."""

    batch_size: int = Field(default=16, ge=1, description="samples per batch")
    group_size: int | None = Field(
        default=None, ge=1, description="replaces the group size of schemes with groups; null keeps the scheme's"
    )
    overrides: dict[str, str] = Field(
        default_factory=dict,
        description="scheme, or `full_precision`, by pattern of module paths; a linear takes the first match",
    )

    def scheme(self, name: str) -> Scheme:
        """Scheme ``name`` with the group size and overrides of this section."""
        scheme = get_scheme(name, self.group_size) if Budget.of_name(name) else get_scheme(name)
        if scheme.group_size is not None and self.group_size is not None:
            scheme = replace(scheme, group_size=self.group_size)
        return replace(scheme, overrides=tuple(self.overrides.items()))


class VariantParams(Section):
    """The variants: every recipe with every scheme."""

    recipes: tuple[str, ...] = Field(min_length=1, description="quantization methods")
    schemes: tuple[str, ...] = Field(
        min_length=1, description="number formats, each combined with every recipe; `mix3.5` for 3.5 bits a weight"
    )

    @property
    def names(self) -> list[str]:
        """Names of the variants, `<recipe>-<scheme>`, in the order of recipes, then schemes."""
        return [f"{recipe}-{scheme}" for recipe in self.recipes for scheme in self.schemes]

    @model_validator(mode="after")
    def _exist(self) -> VariantParams:
        for name in self.recipes:
            get_recipe(name)
        for name in self.schemes:
            get_scheme(name)
        return self


class ExportParams(Section):
    """What the checkpoints are for."""

    engine: str | None = Field(
        default=None,
        description="inference engine that will serve them, a name of docs/engines.md: a scheme that it does not run "
        "is refused before any work; null refuses none",
    )

    @field_validator("engine")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        if value is not None:
            get_engine(value)
        return value


class EvaluateParams(Section):
    """Scores of the variants and of the full-precision model on the benchmarks."""

    benchmarks: tuple[BenchmarkSource, ...] = Field(min_length=1, description="benchmarks to run")
    data: str | None = Field(
        default=None,
        description="folder of all local benchmark files, which DVC watches; null where DVC does not run the stage",
    )
    limit: int | None = Field(
        default=None, ge=1, description="items per benchmark, the same ones for every variant; null takes all"
    )
    seed: int = Field(default=0, ge=0, description="seed of the choice of items and of the bootstrap")
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="items per batch, halved when memory runs out; `auto` starts at 32 on a CPU, 256 on a GPU, 8 for "
        "backend `streamed`",
    )
    max_new_tokens: int | None = Field(
        default=None,
        ge=1,
        description="longest reply in tokens (thousands for a model that thinks); null keeps each benchmark's own",
    )
    min_pixels: int | None = Field(
        default=None, ge=1, description="smallest image size; null keeps the processor's own"
    )
    max_pixels: int | None = Field(default=None, ge=1, description="largest image size; null keeps the processor's own")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="float32", description="dtype of the computation; `auto` takes the checkpoint's"
    )
    backend: Literal["hf", "streamed", "vllm"] = Field(
        default="hf",
        description="`hf` holds the model in memory; `streamed` reads it layer by layer, for models larger than the "
        "device, and generates no replies (see docs/scale.md); `vllm` needs that package and measures no KL",
    )
    divergence: bool = Field(default=True, description="measure NLL and KL on the reference answers")
    divergence_limit: int | None = Field(
        default=None,
        ge=1,
        description="answers measured per benchmark; null measures all (vocabulary-size rows are stored)",
    )
    resamples: int = Field(default=2000, ge=1, le=1_000_000, description="resamples of the bootstrap")
    max_skipped: float = Field(
        default=0.05, ge=0, le=1, description="share of unusable items at which the run is refused"
    )

    @model_validator(mode="after")
    def _has_local_files_in_one_folder(self) -> EvaluateParams:
        for source in self.benchmarks:
            if self.data and source.data and not Path(source.data).is_relative_to(self.data):
                raise ValueError(
                    f"{source.task}: {source.data} is outside evaluate.data = {self.data}, the folder that DVC "
                    "watches; move it there, or set evaluate.data to a folder that holds all local benchmark files"
                )
        return self


class Bounds(Section):
    """The gate: bounds that a registered version must keep to become champion; null sets no bound."""

    min_retention: float | None = Field(
        default=None, ge=0, description="minimum mean retention, in percent of full precision's mean score"
    )
    max_flips: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="maximum share of items, in percent, that changed between right and wrong against full precision",
    )
    floors: dict[str, float] = Field(
        default_factory=dict,
        description="minimum scores in percent by benchmark, as in metrics.json; `mean` is the mean over benchmarks",
    )
    min_items: int | None = Field(
        default=100, ge=1, description="fewest scored items of each benchmark; fewer say too little about quality"
    )
    bound: Literal["point", "low"] = Field(
        default="point",
        description="`min_retention` and `floors` bound the `point` estimate, or the `low` end of its 95 % interval",
    )

    @model_validator(mode="after")
    def _are_percentages(self) -> Bounds:
        for name, value in self.floors.items():
            if not 0 <= value <= 100:
                raise ValueError(f"floors.{name} is {value}, must be a percentage between 0 and 100")
        return self


class RegisterParams(Bounds):
    """The registry of results, and the bounds of its gate."""

    model_name: str = Field(
        description="registered models are called `<model_name>-<scheme>`; their versions are the variants"
    )
    experiment: str = Field(default="tlq", description="MLflow experiment of the runs")
    promote: bool = Field(
        default=True,
        description="move the aliases; a flow run with other values sets this to false unless it is asked to promote",
    )
    max_new_tokens: int = Field(default=64, ge=1, description="longest answer of the registered model, in tokens")


class ReportParams(Section):
    """The report and the model cards."""

    token_samples: int = Field(default=4, ge=1, description="number of samples in the pictures of token importance")
    changed_answers: int = Field(
        default=2,
        ge=0,
        description="examples of each variant's answers that became wrong, and as many that became right",
    )
    base_model: str | None = Field(
        default=None,
        description="hub id of the full-precision model for the cards; null leaves it out for a local folder",
    )


class Download(Section):
    """An entry of section `fetch`: files of the hub at one commit."""

    kind: Literal["model", "calibration", "benchmarks"] = Field(
        description="purpose; a preset replaces the entries of its own kind"
    )
    repo: str = Field(description="hub id of a model or data set")
    revision: str = Field(description="commit, 40 hexadecimal digits: branches and tags move")
    out: str = Field(description="folder that the files are written to")
    files: tuple[str, ...] | None = Field(
        default=None, description="patterns of file names; null takes what a model needs, or all files of a data set"
    )

    @property
    def repo_type(self) -> str:
        return repo_type(self.kind)

    @model_validator(mode="after")
    def _is_pinned(self) -> Download:
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(
                f"revision of {self.repo} is {self.revision!r}, must be a commit (40 hexadecimal digits): branches and "
                "tags move; the commit is in the history on the repository's page on the hub"
            )
        return self


def repo_type(kind: str) -> str:
    """The hub's repository type (`model` or `dataset`) of a kind of download."""
    return "model" if kind == "model" else "dataset"


class FetchParams(RootModel[dict[str, Download]]):
    """Downloads by name; `python -m tasks.preset` writes them."""

    model_config = ConfigDict(frozen=True)


class RecipesParams(RootModel[dict[str, dict[str, Any]]]):
    """Values that replace values of a recipe's row in tlq/recipes.py, by recipe."""

    model_config = ConfigDict(frozen=True)


#: Every section of params.yaml, in the order of the file.
SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelParams,
    "demo": DemoParams,
    "prepare": PrepareParams,
    "importance": ImportanceParams,
    "calibset": CalibsetParams,
    "calibrate": CalibrateParams,
    "variants": VariantParams,
    "recipes": RecipesParams,
    "export": ExportParams,
    "evaluate": EvaluateParams,
    "register": RegisterParams,
    "report": ReportParams,
    "fetch": FetchParams,
}
