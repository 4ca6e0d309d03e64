"""``secateur run``: all stages of one recipe, each skipped if it is done already."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from secateur.cli import Json, app, emit
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.recipe import Heal, Prune, Recipe

_QUESTION = "What is pruning?"


@app.command()
def run(
    recipe: Annotated[Path, Argument(help="Recipe file; docs/recipes.md lists the keys.")],
    set_: Annotated[
        list[str] | None, Option("--set", help="Change a key: prune.pattern=4:8; repeatable.")
    ] = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace results of another recipe.")
    ] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="No progress on stderr.")] = False,
    json: Json = False,
) -> None:
    """Prune, compile, serve and measure a model as a recipe says; goes on where it stopped."""
    from secateur.recipe import load_recipe

    chosen = load_recipe(recipe, set_)
    summary = _Run(chosen, overwrite, quiet).all_stages()
    if json:
        emit(summary)
    else:
        from rich.console import Console

        from secateur.bench import render_summary

        console = Console()
        console.print(render_summary(summary))
        console.print(
            f"everything is in {chosen.output}; open {chosen.output}/report.html", soft_wrap=True
        )


class _Run:
    """One recipe on its way through the stages, all under ``recipe.output``."""

    def __init__(self, recipe: Recipe, overwrite: bool, quiet: bool) -> None:
        self.recipe = recipe
        self.overwrite = overwrite
        self.quiet = quiet
        self.output = Path(recipe.output)

    def all_stages(self) -> dict[str, Any]:
        """Run what is not done yet; the summary dense against sparse."""
        from secateur.artifact import Manifest
        from secateur.compile.values import DTYPES
        from secateur.source import resolve_model

        values = self.recipe.compile.values
        self._say(f"model: {self.recipe.model}")
        source = resolve_model(self.recipe.model, self.output / "source")
        pruned = self._prune_and_heal(source)
        if Manifest.read(pruned).kind != "narrowed" or values not in (None, *DTYPES):
            packed = self._compile(pruned, "packed")
        else:  # smaller matrices without zeros: a type is all that can change
            packed = self._compile(pruned, "dense", "narrowed") if values else pruned
        dense = source
        if values in DTYPES:  # integers are compared with the model as it is
            dense = self._compile(source, "dense")
        self._serve_once(packed)
        return self._bench(dense, packed)

    def _say(self, line: str) -> None:
        if not self.quiet:
            print(f"== {line}", file=sys.stderr, flush=True)

    def _prune_and_heal(self, source: Path) -> Path:
        """In as many rounds as the recipe says; the directory of the last one."""
        from secateur.prune import share_of_round

        heal = self.recipe.heal
        if heal is None:
            return self._prune(source, self.recipe.prune, "pruned")
        model = source
        for number in range(heal.rounds):
            prune, own = share_of_round(self.recipe.prune, heal, number)
            end = f"-{number + 1}" if heal.rounds > 1 else ""
            model = self._prune(model, prune, f"pruned{end}")
            model = self._heal(model, source, own, f"healed{end}")
        return model

    def _heal(self, pruned: Path, source: Path, heal: Heal, name: str) -> Path:
        from secateur.artifact import Manifest
        from secateur.cli.heal_command import show_healed
        from secateur.prune import heal_model

        output = self.output / name
        settings = heal.model_copy(update={"teacher": heal.teacher or str(source)})
        wanted = Manifest.read(pruned).recipe | {"heal": settings.model_dump(mode="json")}
        if self._is_done(output, wanted):
            return output
        self._say(f"heal: {heal.tokens:,} tokens of {heal.data} → {output}")
        result = heal_model(pruned, output, settings, overwrite=self.overwrite, quiet=self.quiet)
        if not self.quiet:
            show_healed(result, sys.stderr)
        return output

    def _prune(self, source: Path, prune: Prune, name: str) -> Path:
        from secateur.cli.prune_command import show_pruned
        from secateur.prune import prune_model

        recipe, output = self.recipe, self.output / name
        wanted = {
            "calibration": recipe.calibration.model_dump(),
            "prune": prune.model_dump(mode="json"),
        }
        if self._is_done(output, wanted):
            return output
        self._say(f"prune: {prune.method}, {prune.pattern} → {output}")
        result = prune_model(
            str(source),
            output,
            prune,
            recipe.calibration,
            overwrite=self.overwrite,
            quiet=self.quiet,
        )
        if not self.quiet:
            show_pruned(result, sys.stderr)
        return output

    def _compile(self, model: Path, form: str, name: str | None = None) -> Path:
        from secateur.compile import FORMATS

        output, values = self.output / (name or form), self.recipe.compile.values
        options: dict[str, Any] = {"values": values}
        wanted = {"compile": {"format": form, **options}}
        if form == "packed":
            from secateur.artifact import Manifest
            from secateur.compile.pack import recorded

            settings = self.recipe.compile
            text = self.recipe.calibration if settings.quantize == "gptq" else None
            options |= settings.model_dump(exclude={"format"})
            options |= {"calibration": text, "quiet": self.quiet}
            wanted = Manifest.read(model).recipe | {"compile": recorded(settings, text)}
        if self._is_done(output, wanted):
            return output
        self._say(f"compile: {form}, values {values or 'as they are'} → {output}")
        FORMATS[form].write(model, output, **options, overwrite=self.overwrite)
        return output

    def _is_done(self, output: Path, wanted: dict[str, Any]) -> bool:
        from secateur.artifact import MANIFEST, Manifest, differences

        if not (output / MANIFEST).exists():
            return False
        found = Manifest.read(output).recipe
        if found == wanted:
            self._say(f"{output} is there already")
            return True
        if self.overwrite:
            return False
        raise UsageError(
            f"{output} was made by another recipe: {'; '.join(differences(found, wanted))}",
            "pass --overwrite to make it anew, or give another output",
        )

    def _serve_once(self, model: Path) -> None:
        """Start the endpoint, ask one question over HTTP, show the answer, stop the endpoint."""
        import urllib.request  # a thirtieth of a second, which other commands need not pay

        from secateur.bench.endpoint import served
        from secateur.model import load_tokenizer

        self._say(f"serve: {model}")
        chat = load_tokenizer(model).chat_template is not None  # base models only complete text
        body: dict[str, Any] = {"model": model.name, "max_tokens": 32, "temperature": 0}
        if chat:
            body["messages"] = [{"role": "user", "content": _QUESTION}]
        else:
            body["prompt"] = _QUESTION
        settings = self.recipe.serve
        arguments = ["--engine", settings.engine]
        if settings.threads is not None:
            arguments += ["--threads", str(settings.threads)]
        with served(model, arguments) as endpoint:
            request = urllib.request.Request(
                f"{endpoint.url}/v1/{'chat/' if chat else ''}completions",
                json_module.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=300) as response:
                choice = json_module.load(response)["choices"][0]
        answer = choice["message"]["content"] if chat else choice["text"]
        self._say(f"asked over HTTP: {_QUESTION}\n   answered: {answer.strip()!r}")

    def _bench(self, dense: Path, packed: Path) -> dict[str, Any]:
        from secateur.bench import measure_accuracy, measure_latency, summarise
        from secateur.bench.report import make_report
        from secateur.checkpoint import write_json
        from secateur.progress import progress

        wanted, folder = self.recipe.bench, self.output / "bench"
        folder.mkdir(parents=True, exist_ok=True)
        self._say("bench: accuracy")
        with progress("windows", self.quiet) as tick:
            accuracy = measure_accuracy([packed], wanted.accuracy, against=dense, progress=tick)
        write_json(folder / "accuracy.json", accuracy.to_json())
        self._say("bench: latency, dense and sparse taking turns")
        with progress("rounds", self.quiet) as tick:
            latency = measure_latency([packed], wanted.latency, against=dense, progress=tick)
        write_json(folder / "latency.json", latency.to_json())
        summary = summarise(dense, packed, accuracy, latency)
        write_json(self.output / "summary.json", summary)
        results = [folder / "accuracy.json", folder / "latency.json", packed]
        make_report(results, self.output / "report.html")
        return summary
