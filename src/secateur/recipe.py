"""Recipe: everything that decides the result of a run, as one validated, frozen value.

A recipe is written in YAML 1.2 or given by flags; both go through the same models, so that an
unknown key is refused with the nearest known one and a wrong value with what was expected.
"""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from secateur.errors import UsageError, did_you_mean
from secateur.pattern import Pattern


def _counts(value: Any) -> Any:
    """One number, or those of "8,32", as a list."""
    if isinstance(value, str):
        return value.split(",")
    return [value] if isinstance(value, int) else value


Counts = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_counts), Field(min_length=1)
]
ValueType = Literal["fp32", "bf16", "fp16", "int8", "int4", "fp8"]
Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """A part of a recipe: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerRule(Section):
    """An exception for some layers; of several that match, the last one counts."""

    match: str = Field(description="Glob over full layer names, e.g. '*.down_proj'.")
    pattern: Pattern = Field(description="The pattern of these layers; 'dense' leaves them alone.")


class Calibration(Section):
    """The text whose activations guide the pruning."""

    data: str = Field(
        "self",
        description="'self' (the model writes its own text from its BOS token), 'pydoc' (Python's "
        "language reference, from the interpreter), a .txt or .jsonl file, 'wikitext2', 'c4', or "
        "the name of a Hugging Face dataset.",
    )
    samples: int = Field(32, ge=1, description="Number of sequences.")
    length: int = Field(512, ge=2, description="Tokens per sequence; capped by model and data.")
    seed: int = Field(0, ge=0, description="Decides which text is drawn.")


class Prune(Section):
    """Which weights go."""

    method: str = Field(
        "alps", description="A method and its refinements, joined by +; see `secateur methods`."
    )
    settings: dict[str, bool | int | float | str] = Field(
        {}, description="Settings of the method's steps, e.g. {dsnot.cycles: 50}."
    )
    pattern: Pattern = Field(Pattern.parse("2:4"), description="See `secateur prune --help`.")
    layers: tuple[LayerRule, ...] = Field((), description="Exceptions by layer name.")
    allocate: Literal["uniform", "owl", "alphapruning"] = Field(
        "uniform",
        description="How a P% pattern is spread over the blocks; P% of all their weights go.",
    )
    permute: bool = Field(
        False,
        description="Reorder channels inside blocks so that N:M keeps more; the dense model's "
        "output stays the same and nothing is slower.",
    )
    multiple: int = Field(
        16, ge=1, description="Structured methods: widths of MLPs are multiples of this."
    )
    strict: bool = Field(
        False, description="Refuse the model if a layer cannot hold its pattern (else: dense)."
    )
    compat: Literal["exact", "reference"] = Field(
        "exact",
        description="'reference' repeats the counting of the authors' code where it differs.",
    )
    device: str = Field("auto", description="'auto', 'cpu', 'cuda' or 'cuda:N'.")
    memory: str | None = Field(
        None, description="Peak memory of the process, e.g. 2GiB; None: what the machine has."
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _rules_are_a_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    def pattern_of(self, layer: str) -> Pattern:
        """The pattern that this recipe asks of a layer."""
        chosen = self.pattern
        for rule in self.layers:
            if fnmatchcase(layer, rule.match):
                chosen = rule.pattern
        return chosen


class Heal(Section):
    """Training of what is kept towards the dense model."""

    data: str = Field(
        "wikitext2", description="Text to train on: as calibration.data, without 'self'."
    )
    teacher: str | None = Field(
        None, description="The dense model; None: the one that was pruned, if it is on the hub."
    )
    tokens: int = Field(160_000, ge=1, description="How many are trained on; the budget.")
    length: int = Field(256, ge=2, description="Tokens per sequence; capped by the model.")
    batch: int = Field(2, ge=1, description="Sequences per step.")
    at_once: int = Field(2, ge=1, description="Sequences in memory at once.")
    train: Literal["kept", "lora", "norms"] = Field(
        "kept",
        description="'kept': all kept weights; 'lora': low-rank changes under the masks, merged at "
        "the end; 'norms': norms and biases.",
    )
    rounds: int = Field(
        1,
        ge=1,
        description="`secateur run`: prune and heal in this many rounds, P% and tokens being "
        "shared out among them.",
    )
    rank: int = Field(16, ge=1, description="lora: rank of the change of a matrix.")
    rate: float = Field(2e-4, gt=0, description="Highest learning rate; it rises, then falls.")
    hidden: float = Field(0.0, ge=0, description="Weight of the blocks' outputs in the loss.")
    clip: float = Field(1.0, gt=0, description="Largest norm of a step's gradient.")
    held_out: int = Field(8, ge=1, description="Sequences that are measured on instead.")
    every: int = Field(50, ge=1, description="Steps between measurements; a run resumes there.")
    patience: int = Field(3, ge=1, description="Stop after this many without improvement.")
    checkpointing: bool = Field(
        False, description="Compute activations twice instead of keeping them."
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Of the computation; weights are trained in fp32."
    )
    device: Literal["auto", "cpu"] = Field("auto", description="'auto' or 'cpu'.")
    seed: int = Field(0, ge=0, description="Decides the order of the text.")


class Compile(Section):
    """How the kept weights are stored."""

    format: Literal["packed"] = Field("packed", description="The form of the result.")
    values: ValueType | None = Field(
        None,
        description="Type of the stored weights; None keeps the model's own. int8, int4 and fp8 "
        "have scales, and quantise the linears that pruning left dense, too.",
    )
    group_size: Literal[32, 64, 128] = Field(
        64, description="int8, int4: consecutive inputs of a row that share a scale."
    )
    quantize: Literal["gptq", "rtn"] = Field(
        "gptq",
        description="int8, int4, fp8: 'gptq' lets later weights make up for the rounding of "
        "earlier ones, on the calibration text; 'rtn' rounds each to nearest and reads no text.",
    )
    device: str = Field("auto", description="gptq: 'auto', 'cpu', 'cuda' or 'cuda:N'.")


class Serve(Section):
    """How the model is run when it is offered; a run takes a free port of this machine."""

    engine: Literal["auto", "transformers"] = Field("auto", description="What runs the model.")
    threads: int | None = Field(None, ge=1, description="CPU threads; None: all cores.")


class Accuracy(Section):
    """What `bench accuracy` reads."""

    data: str = Field("pydoc", description="Evaluation text: as calibration.data, without 'self'.")
    window: int = Field(512, ge=2, description="Tokens per window.")
    stride: int | None = Field(None, ge=1, description="Step between windows; None: the window.")
    windows: int | None = Field(None, ge=1, description="Use the first this many; None: all.")
    top_k: int = Field(5, ge=1, description="Likeliest next tokens that are compared with dense.")
    tasks: tuple[str, ...] | None = Field(
        None, description="Tasks of lm-eval, or .jsonl files of items; None: none."
    )
    limit: int | None = Field(None, ge=1, description="Items of each task; None: all.")


class Latency(Section):
    """What `bench latency` measures."""

    prompt: Counts = Field((128,), description="Prompt tokens of the prefill; one or several.")
    new_tokens: int = Field(32, ge=1, description="Tokens decoded after it.")
    batch: Counts = Field((1,), description="Sequences at once; one or several.")
    rounds: int = Field(5, ge=2, description="Interleaved rounds at least.")
    min_seconds: float = Field(3.0, ge=0, description="Go on with rounds until this much time.")


class Bench(Section):
    """What is measured."""

    accuracy: Accuracy = Accuracy()
    latency: Latency = Latency()


class Recipe(Section):
    """A whole run: model → pruned → packed → served → measured."""

    version: Literal[1] = 1
    model: str = Field(description="Model directory, .gguf file or Hugging Face hub name.")
    output: str = Field(description="Directory that receives everything.")
    calibration: Calibration = Calibration()
    prune: Prune = Prune()
    heal: Heal | None = Field(None, description="Training after pruning; None: none.")
    compile: Compile = Compile()
    serve: Serve = Serve()
    bench: Bench = Bench()


class _Yaml12(yaml.SafeLoader):
    """YAML 1.2 core schema: PyYAML's 1.1 reads `2:4` as 124, `1e-4` as text, `on` as True."""


_Yaml12.yaml_implicit_resolvers = {}
for _tag, _form, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Yaml12.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_form})$"), list(_first)
    )


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0 if text[:2] in ("0x", "0o") else 10)


_Yaml12.add_constructor("tag:yaml.org,2002:int", _int)


def read_yaml(text: str, origin: str = "YAML") -> Any:
    """Parse one YAML 1.2 document.

    Raises:
        UsageError: it is not YAML; says where.
    """
    try:
        return yaml.load(text, _Yaml12)
    except yaml.YAMLError as fault:
        where = getattr(fault, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UsageError(
            f"{origin}{line}: {getattr(fault, 'problem', None) or fault}", "correct the YAML"
        ) from fault


def load_recipe(path: str | Path, changes: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply ``--set key.path=value`` changes to it.

    Raises:
        UsageError: the file is missing, not YAML, or does not describe a recipe.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as fault:
        raise UsageError(
            f"the recipe {path} cannot be read: {fault.strerror}", "check the path"
        ) from fault
    content = read_yaml(text, str(path))
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a mapping of keys", "see docs/recipes.md for the keys")
    for change in changes or []:
        _apply(content, change)
    return validate(Recipe, content, str(path))


def _apply(content: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise UsageError(
            f"--set {change!r} is not of the form key.path=value", "e.g. --set prune.pattern=4:8"
        )
    *folders, last = key.split(".")
    at: Any = content
    for folder in folders:
        if at.get(folder) is None:
            at[folder] = {}
        at = at[folder]
        if not isinstance(at, dict):
            raise UsageError(
                f"--set {key}: {folder!r} holds a value, not keys", "set the value itself"
            )
    at[last] = read_yaml(text, f"--set {key}")


def validate(model: type[Model], content: dict[str, Any], origin: str) -> Model:
    """Validate plain data as ``model``; every fault becomes one sentence.

    Raises:
        UsageError: names the key, what was there and what to write.
    """
    try:
        return model.model_validate(content)
    except ValidationError as fault:
        # A misspelt key also leaves the right one missing: speak of the misspelling.
        faults = fault.errors()
        first = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _keys_at(model, first["loc"][:-1])
            raise UsageError(
                f"{origin}: unknown key {place!r}", did_you_mean(str(first["loc"][-1]), known)
            ) from fault
        if first["type"] == "missing":
            raise UsageError(
                f"{origin}: the key {place!r} is missing", f"add {place}: …"
            ) from fault
        raise UsageError(
            f"{origin}: {place} = {first['input']!r}: {first['msg']}", "correct the value"
        ) from fault


def _keys_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys that the model allows at a place."""
    at: Any = model
    for part in path:
        if isinstance(part, int):
            continue
        at = at.model_fields[part].annotation
        while not (isinstance(at, type) and issubclass(at, BaseModel)):
            at = at.__args__[0]
    return list(at.model_fields)


def schema_json() -> str:
    """The JSON schema of `Recipe`, as published in docs/recipe.schema.json."""
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"
