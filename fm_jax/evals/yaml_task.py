"""Tasks of lm-evaluation-harness: a YAML file and its data become documents, prompts, choices and golds. Layer 4.

Reads the fields of version 0.4.13 and means by each what it means there. A field that it cannot honour is an error
that names it and its file; code in a task file (`!function`) is never run.

Try:  python -m fm_jax.evaluate --workdir runs/x --tasks path/to/task.yaml
"""

import ast
from collections.abc import Callable
import dataclasses
import functools
import hashlib
import json
from pathlib import Path
import re
from typing import Any, NamedTuple

from fm_jax.data import questions
from fm_jax.errors import UserError, choose
from fm_jax.evals import filters, metrics, tables

OUTPUT_TYPES = ("loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until")
MAX_GEN_TOKS = 256   # where generation_kwargs name no length
HONOURED = ("task", "dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split",
            "test_split", "fewshot_split", "doc_to_text", "doc_to_target", "doc_to_choice", "output_type",
            "description", "target_delimiter", "fewshot_delimiter", "fewshot_config", "num_fewshot", "gen_prefix",
            "generation_kwargs", "repeats", "filter_list", "metric_list")
# They change no number. unsafe_code: generated programs are confined in any case.
WITHOUT_EFFECT = ("task_alias", "tag", "group", "metadata", "should_decontaminate", "doc_to_decontamination_query",
                  "unsafe_code")
REFUSED = {   # field: why
    "process_docs": "code in a task file is not run; write the processed documents to a file",
    "process_results": "code in a task file is not run; use metric_list and filter_list",
    "custom_dataset": "code in a task file is not run; write the documents to a file",
    "class": "code in a task file is not run",
    "use_prompt": "prompts of promptsource are not installed; write the prompt in doc_to_text",
    "doc_to_image": "images are not given to a language model", "doc_to_audio": "nor is audio",
    "task_list": "one file is one task here",
}
FEWSHOT = ("sampler", "split", "samples", "doc_to_text", "doc_to_choice", "doc_to_target", "gen_prefix",
           "fewshot_delimiter", "target_delimiter")
REFUSED_FEWSHOT = {"process_docs": REFUSED["process_docs"],
                   "fewshot_indices": "version 0.4.13 reads it and does not use it; write these documents in samples"}
SAMPLERS = ("default", "first_n")
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")   # the first one given counts
GENERATION = ("until", *LENGTHS, "do_sample", "temperature", "top_k", "top_p")


class Generation(NamedTuple):
    """How answers are generated; text from the first of each `until`, in their order, on is cut off."""

    until: tuple[str, ...]
    max_gen_toks: int
    temperature: float
    top_k: int
    top_p: float


class Shots(NamedTuple):
    """Where worked examples come from, and how they are written where that is not as the question is."""

    pool: list[dict]
    sampler: str
    excludes_question: bool   # the document asked about may be in the pool
    text: Any
    target: Any
    choice: Any
    gen_prefix: str | None
    target_delimiter: str
    fewshot_delimiter: str


@dataclasses.dataclass(frozen=True)
class Task:
    """A task with its data. `columns`: those of the documents; a field that is one of them stands for its value."""

    path: str
    name: str
    output_type: str
    docs: list[dict]
    data: str                 # where they are from
    columns: tuple[str, ...]
    shots: Shots
    num_fewshot: int
    doc_to_text: Any
    doc_to_target: Any
    doc_to_choice: Any
    description: str
    gen_prefix: str | None
    target_delimiter: str
    fewshot_delimiter: str    # here of a chat's system messages; of shots, as `shots` has it
    generation: Generation | None
    repeats: int
    metrics: tuple[metrics.Metric, ...]
    filters: tuple[tuple[str, tuple[filters.Step, ...]], ...]   # (name of a pipeline, its steps)
    version: Any              # metadata.version, for the table
    fingerprint: str          # sha256 of all fields and documents: equal fingerprint, equal requests

    def text(self, doc: dict, field=None) -> str | int:
        """Returns the question, or which choice is the question. `field`: instead of doc_to_text."""
        field = self.doc_to_text if field is None else field
        if isinstance(field, int):
            return field
        if field in self.columns:
            return self._value(doc, field, "doc_to_text")
        text = self._render(field, doc, "doc_to_text")
        return self._literal(text, "doc_to_text") if text.isdigit() and self.doc_to_choice is not None else text

    def target(self, doc: dict, field=None) -> str | int | list:
        """Returns the answer: a text, the number of a choice, or a list of these of which any will do."""
        field = self.doc_to_target if field is None else field
        if isinstance(field, (int, list)):
            return field
        if field in self.columns:
            return self._value(doc, field, "doc_to_target")
        text = self._render(field, doc, "doc_to_target")
        if text.isdigit() and self.doc_to_choice is not None:
            return self._literal(text, "doc_to_target")
        if len(text) >= 2 and text[0] == "[" and text[-1] == "]":
            try:
                return ast.literal_eval(text)
            except (SyntaxError, ValueError):   # a text in brackets
                return text
        return text

    def choices(self, doc: dict, field=None) -> list[str]:
        """Returns the choices."""
        field = self.doc_to_choice if field is None else field
        if isinstance(field, dict):
            found = list(field.values())
        elif isinstance(field, list):
            found = field
        elif field in self.columns:
            found = self._value(doc, field, "doc_to_choice")
        else:
            found = self._literal(self._render(field, doc, "doc_to_choice"), "doc_to_choice")
        if not isinstance(found, list) or not found or not all(isinstance(c, str) and c for c in found):
            raise UserError(f"{self.path}: doc_to_choice gives {found!r}, not a list of texts, in {self.data}")
        return found

    def prefix(self, doc: dict, field: str | None) -> str | None:
        """Returns the beginning of the answer that the model is given."""
        if not field:
            return field
        if field in self.columns or field in doc:
            return self._value(doc, field, "gen_prefix")
        return self._render(field, doc, "gen_prefix")

    def head(self, doc: dict) -> str:
        """Returns the description, before the first shot."""
        if not self.description:
            return ""
        if self.description in doc:
            return doc[self.description]
        return self._render(self.description, doc, "description")

    def _value(self, doc, column, field):
        if column not in doc:   # one of fewshot_config.samples
            raise UserError(f"{self.path}: {field} names the column {column!r}, which a document lacks: {doc}")
        return doc[column]

    @functools.cached_property
    def _compiled(self):
        """Returns a function from a template's text to the template: compiling takes 20 times as long as rendering."""
        return functools.cache(_environment().from_string)

    def _render(self, template, doc, field):
        import jinja2

        try:
            return self._compiled(template).render(**doc)
        except jinja2.UndefinedError as error:
            raise UserError(f"{self.path}: {field}: {error.message} in a document of {self.data}, which has the "
                            f"columns {', '.join(self.columns)}") from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise UserError(f"{self.path}: {field} {template!r}: {error}") from error

    def _literal(self, text, field):
        try:
            return ast.literal_eval(text)
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{self.path}: {field} gives {text!r}, which is no Python list or number") from error


def load(path, num_fewshot: int | None = None, *, fields: dict | None = None,
         catalogue: Callable[[str], dict] = questions.read) -> Task:
    """Returns the task of a YAML file, its data read.

    Args:
      num_fewshot: instead of the file's; a file that says 0 means it, and stays at 0.
      fields: instead of those in the file, as a group of tasks changes them.
      catalogue: what reads a `dataset_path: catalogue:NAME`.

    Raises:
      UserError: what the file or its data lack, or a field that cannot be honoured; each names the field and the file.
    """
    path = Path(path)
    fields = {k: v for k, v in (read(path) if fields is None else fields).items() if v is not None}
    for name, value in fields.items():
        if name in REFUSED and value is not False:
            raise UserError(f"{path}: {name} cannot be honoured: {REFUSED[name]}")
        if name not in REFUSED:
            choose(name, HONOURED + WITHOUT_EFFECT, f"{path}: field")
    output_type = choose(fields.get("output_type", "generate_until"), OUTPUT_TYPES, f"{path}: output_type")
    for name in ("task", "doc_to_text", "doc_to_target"):
        if name not in fields:
            raise UserError(f"{path}: {name} is missing")
    if (output_type == "multiple_choice") > ("doc_to_choice" in fields):
        raise UserError(f"{path}: doc_to_choice is missing, which output_type multiple_choice needs")
    for name in ("task", "description", "target_delimiter", "fewshot_delimiter", "gen_prefix"):
        if not isinstance(fields.get(name, ""), str):
            raise UserError(f"{path}: {name} must be a text, not {fields[name]!r}")
    if num_fewshot is None or fields.get("num_fewshot") == 0:
        num_fewshot = fields.get("num_fewshot", 0)
    for name, value, least in (("num_fewshot", num_fewshot, 0), ("repeats", fields.get("repeats", 1), 1)):
        if type(value) is not int or value < least:
            raise UserError(f"{path}: {name} must be a number, {least} or more, not {value!r}")

    splits = tables.Splits(path, fields, catalogue)
    split = fields.get("test_split") or fields.get("validation_split")
    if split is None:
        raise UserError(f"{path}: neither test_split nor validation_split says which documents are asked about")
    docs = splits.read(split)
    data = splits.source(split)
    if not docs:
        raise UserError(f"{path}: {data} has no documents")
    columns = tuple(docs[0])
    named = {n: fields.get(n) for n in ("doc_to_text", "doc_to_target", "doc_to_choice")}
    for name, value in named.items():
        if isinstance(value, str) and value.isidentifier() and not value.isdigit() and value not in columns:
            choose(value, columns, f"{path}: {name}: column of {data}")
        elif isinstance(value, bool) or not isinstance(value, (str, int, list, dict, type(None))):
            raise UserError(f"{path}: {name} must be a template or a column, not {value!r}")
    found = metrics.from_fields(fields.get("metric_list"), output_type, str(path))
    pipelines = filters.from_fields(fields.get("filter_list"), output_type, str(path))
    generation = generation_of(fields, str(path)) if output_type == "generate_until" else None
    if generation is None and "generation_kwargs" in fields:
        raise UserError(f"{path}: generation_kwargs has no meaning with output_type {output_type}")
    shots = _shots(fields, splits, str(path), num_fewshot)
    kept = {k: v for k, v in fields.items() if k not in WITHOUT_EFFECT and not k.startswith("dataset_")}
    whole = json.dumps([kept, num_fewshot, docs, shots.pool if num_fewshot else []], default=str, sort_keys=True)
    metadata = fields.get("metadata")
    return Task(
        path=str(path), name=fields["task"], output_type=output_type, docs=docs, data=data, columns=columns,
        shots=shots, num_fewshot=num_fewshot, **named, description=fields.get("description", ""),
        gen_prefix=fields.get("gen_prefix"), target_delimiter=fields.get("target_delimiter", " "),
        fewshot_delimiter=fields.get("fewshot_delimiter", "\n\n"), generation=generation,
        repeats=fields.get("repeats", 1), metrics=found, filters=pipelines,
        version=metadata.get("version") if isinstance(metadata, dict) else None,
        fingerprint=hashlib.sha256(whole.encode()).hexdigest())


def read(path, *, code: bool = False, seen=()) -> dict:
    """Returns the fields of a file, those of its `include` below its own.

    `code`: a field that is code is None, instead of an error.
    """
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        """Refuses code."""

    def function(loader, node):
        if not code:
            raise UserError(f"{path}: line {node.start_mark.line + 1} has !function {node.value}: code in a task file "
                            "is not run")

    Loader.add_constructor("!function", function)
    path = Path(path)
    if path.resolve() in seen:
        raise UserError(f"{path} includes itself")
    try:
        fields = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UserError(f"cannot read the task {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: a task is a table of fields, not {fields!r:.60}")
    merged, includes = {}, fields.pop("include", [])
    for other in includes if isinstance(includes, list) else [includes]:
        merged |= read(path.parent / other, code=code, seen=(*seen, path.resolve()))
    return merged | fields


def _environment():
    """Returns the harness's Jinja2 environment, sandboxed."""
    import jinja2
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined,
                                                               keep_trailing_newline=True)
    environment.filters["regex_replace"] = lambda string, pattern, repl, count=0: re.sub(pattern, repl, string,
                                                                                         count=count)
    return environment


def generation_of(fields: dict, path: str) -> Generation:
    """Returns how a task's answers are generated."""
    given = fields.get("generation_kwargs", {})
    for name in given:
        choose(name, GENERATION, f"{path}: generation_kwargs")
    given = {k: v for k, v in given.items() if v is not None}
    until = given.get("until", [fields.get("fewshot_delimiter", "\n\n")])
    until = until if isinstance(until, list) else [until]
    try:
        length = int(next((given[n] for n in LENGTHS if n in given), MAX_GEN_TOKS))
        temperature = float(given.get("temperature", 0))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: generation_kwargs: {error}") from error
    do_sample = given.get("do_sample", temperature > 0)
    if do_sample and temperature <= 0:
        raise UserError(f"{path}: generation_kwargs: do_sample needs a temperature above 0")
    if length < 1 or not all(isinstance(stop, str) for stop in until):
        raise UserError(f"{path}: generation_kwargs: until must be texts and max_gen_toks at least 1, got {given}")
    return Generation(tuple(until), length, temperature if do_sample else 0.0, given.get("top_k", 0),
                      given.get("top_p", 1.0))


def _shots(fields, splits, path, num_fewshot):
    """Returns where a task's worked examples come from."""
    given = fields.get("fewshot_config", {})
    for name, value in given.items():
        if name in REFUSED_FEWSHOT and value is not None:
            raise UserError(f"{path}: fewshot_config.{name} cannot be honoured: {REFUSED_FEWSHOT[name]}")
        if name not in REFUSED_FEWSHOT:
            choose(name, FEWSHOT, f"{path}: fewshot_config")
    sampler = choose(given.get("sampler", "default"), SAMPLERS, f"{path}: fewshot_config.sampler")
    split = given.get("split", fields.get("fewshot_split"))
    samples = given.get("samples")
    if split is None and samples is not None:
        if not isinstance(samples, list) or not all(isinstance(s, dict) for s in samples):
            raise UserError(f"{path}: fewshot_config.samples must be a list of documents")
        pool = samples
    else:
        named = [split, *(fields.get(f"{n}_split") for n in ("training", "validation", "test"))]
        pool = splits.read(next(n for n in named if n is not None)) if num_fewshot else []
    both = {n: given.get(n, fields.get(n)) for n in ("doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix")}
    return Shots(pool, sampler, split == fields.get("test_split"), both["doc_to_text"], both["doc_to_target"],
                 both["doc_to_choice"], both["gen_prefix"],
                 given.get("target_delimiter", fields.get("target_delimiter", " ")),
                 given.get("fewshot_delimiter", fields.get("fewshot_delimiter", "\n\n")))
