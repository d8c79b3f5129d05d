"""Evaluates the model of a run on tasks; results go to WORKDIR/eval or --output, and to the terminal.

    python -m fm_jax.evaluate --workdir runs/x
    python -m fm_jax.evaluate --workdir runs/x --tasks piqa,boolq,mmlu --num_fewshot 5 --output results/
    python -m fm_jax.evaluate --workdir runs/x --tasks path/to/task.yaml --limit 100
    python -m fm_jax.evaluate --workdir runs/x --tasks humaneval --chat --system_instruction "You write Python."
    python -m fm_jax.evaluate --compare runs/a runs/b
    python -m fm_jax.evaluate --list_tasks
    python -m fm_jax.evaluate --print_task piqa > my_piqa.yaml     # edit it, then --tasks my_piqa.yaml

Tasks are those of --list_tasks: perplexity (bits per byte of the held-out text), next_sentence (multiple choice from
it), and those of the catalogue, whose data is fetched when first asked for; patterns of their names, such as "mmlu_*";
and files of lm-evaluation-harness, tasks or groups, over local data. What was measured before with the same settings
is not measured again, and an evaluation that was interrupted goes on where it stopped. Layer 5.
"""

from collections.abc import Callable
import hashlib
import inspect
import json
import os
from pathlib import Path
import re
import sys
import tempfile

from absl import flags

from fm_jax import config as config_lib
from fm_jax import distributed
from fm_jax.errors import UserError


def evaluate(workdir, tasks: list[str], *, lm=None, num_fewshot: int | None = None, step: int | None = None,
             mesh: dict | None = None, limit: int = 0, chat=None, data: str = "", output: str = "",
             cache: str = "", done: Callable[[str, dict], None] = lambda name, metrics: None) -> dict[str, dict]:
    """Returns {task or group: metrics}, having written a file for each, with every sample, to `workdir`/eval/STEP.

    A file is named by its task and what else decides its contents: perplexity.json, piqa_5shot_limit100.json,
    perplexity_NAME-FINGERPRINT.json of other data. One that is there already and was made with the same settings, of
    the same parameters, is taken as it is.

    Args:
      lm: the run's model, where it is loaded already; otherwise it is, from `step` and onto `mesh`.
      num_fewshot: worked examples before each question; default what the task says, 3 for next_sentence.
      chat: requests.Chat, for prompts as chats; not of built-in tasks.
      data: a prepared folder whose held-out text is used; default the run's own.
      output: a folder for the files instead, with a table, results.md.
      cache: folder of downloaded catalogue data; default the catalogue's.
      done: called with (task or group, its metrics) when these are known.

    Raises:
      UserError: an unknown task, a task file that cannot be honoured, no run, no held-out text, or a folder that
        cannot be written, before the evaluation.
    """
    import fm_jax
    from fm_jax import storage
    from fm_jax.data import catalogue
    from fm_jax.evals import names, requests, results as results_lib
    from fm_jax.evals.tasks import TASKS

    chosen, groups = names.load(tasks, TASKS, num_fewshot=num_fewshot, cache=cache or catalogue.DEFAULT_CACHE)
    if chat and None in chosen.values():
        raise UserError("--chat: built-in tasks are not asked as chats; leave out "
                        f"{', '.join(n for n, t in chosen.items() if t is None)}")
    lm = lm or fm_jax.load(workdir, step=step, mesh=mesh)
    texts, source = held_out(lm.config, data) if None in chosen.values() else ([], "")
    there = storage.place(output or workdir)
    if not output:
        there = there.joinpath("eval", *([] if lm.step is None else [str(lm.step)]))
    with storage.local(there, "") as files:
        folder = files.path
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder):
                files.push()
        except OSError as error:
            raise UserError(f"cannot write to {folder}, where the results go: {error.strerror}") from error
        for task in filter(None, chosen.values()):   # what is wrong with the last is said before hours on the first
            requests.prepare(lm, task, limit=limit, chat=chat)
        settings = {"version": fm_jax.__version__, "model": parameters_mark(lm.params), "step": lm.step,
                    "limit": limit}
        if chat:
            template = hashlib.sha256(lm.tokenizer.chat_template.encode()).hexdigest()
            settings |= {"chat": chat._asdict(), "chat_template": template}
        suffix = "_chat" * bool(chat) + f"_limit{limit}" * bool(limit)
        found = {}
        for name, task in chosen.items():
            if task:
                found[name] = _file_task(lm, task, folder, settings, suffix, chat)
            else:
                found[name] = _built_in(lm, name, texts, folder, settings | {"data": source}, suffix, num_fewshot,
                                        data)
            files.push()
            done(name, found[name]["metrics"])
        for name, group in groups.items():
            found[name] = _group(name, group, found, folder, settings, suffix)
            done(name, found[name]["metrics"])
        if lm.work.requests:
            print(lm.work)
        if output:
            _write(folder / "results.md", results_lib.markdown(found), "the table")
    return {name: result["metrics"] for name, result in found.items()}


def _file_task(lm, task, folder, settings, suffix, chat):
    """Returns the results of a task of a file."""
    from fm_jax.evals import requests

    settings = settings | {
        "num_fewshot": task.num_fewshot, "task": task.fingerprint, "task_version": task.version,
        "higher_is_better": {m.name: m.higher_is_better for m in task.metrics},
        "aggregations": {m.name: m.aggregation for m in task.metrics}}
    return _measured(folder / f"{_slug(task.name)}_{task.num_fewshot}shot{suffix}.json", settings,
                     lm, lambda lm: requests.evaluate(lm, task, limit=settings["limit"], chat=chat))


def _built_in(lm, name, texts, folder, settings, suffix, num_fewshot, data):
    """Returns the results of a task of evals/tasks.py."""
    from fm_jax.data import prepared
    from fm_jax.evals.tasks import SHOTS, TASKS

    few, shots = {}, ""
    if "num_fewshot" in inspect.signature(TASKS[name]).parameters:
        few = {"num_fewshot": SHOTS if num_fewshot is None else num_fewshot}
        shots = f"_{few['num_fewshot']}shot"
    settings = settings | few | {"texts": hashlib.sha256("\0".join(texts).encode()).hexdigest()}
    if data:
        suffix += f"_{Path(data).resolve().name}-{prepared.read_manifest(data)['fingerprint'][:8]}"
    return _measured(folder / f"{_slug(name)}{shots}{suffix}.json", settings,
                     lm, lambda lm: TASKS[name](lm, texts, limit=settings["limit"], **few))


def _group(name, group, found, folder, settings, suffix):
    """Returns the results of a group, from those of its tasks."""
    from fm_jax.evals import results as results_lib

    of = [found[task] for task in group.tasks]
    shots = sorted({result["num_fewshot"] for result in of})
    result = settings | {
        "tasks": list(group.tasks), "task_version": group.version,
        "num_fewshot": shots[0] if len(shots) == 1 else shots,
        "higher_is_better": {k: v for r in of for k, v in r["higher_is_better"].items()},
        "metrics": results_lib.aggregate(group, found), "samples": results_lib.samples(group, found)}
    shots = f"_{shots[0]}shot" * (len(shots) == 1)
    _write(folder / f"{_slug(name)}{shots}{suffix}.json", json.dumps(result), f"its metrics: {result['metrics']}")
    return result


def _slug(name):
    """Returns a name as a file may have it."""
    return re.sub(r"[^\w-]", "_", name)


def parameters_mark(params) -> str:
    """Returns a sha256 of a checksum of each parameter array's bits: the same on any mesh, another after any change."""
    import jax
    import jax.numpy as jnp

    def checksum(array):
        bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
        index = lambda axis: jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        place = sum(index(axis) * jnp.uint32(pow(2654435761, axis + 1, 2**32)) for axis in range(array.ndim))
        return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)   # odd factors: no single change is lost

    sums = jax.device_get(jax.jit(lambda params: jax.tree.map(checksum, params))(params))
    return hashlib.sha256(str(list(map(int, jax.tree.leaves(sums)))).encode()).hexdigest()


def _measured(path, settings, lm, run):
    """Returns the results of `run(lm)`, written to `path`, or those there where their settings are the same.

    What the model answers until then is in a file beside it, with which an interrupted evaluation goes on.
    """
    from fm_jax.evals.journal import Journal

    settings = json.loads(json.dumps(settings))
    try:
        text = path.read_text()
    except (OSError, ValueError):
        text = ""
    distributed.agree(text, path)
    try:
        before = json.loads(text)
        if {k: before.pop(k) for k in settings} == settings and set(before) == {"metrics", "samples"}:
            print(f"{path} is of the same model and settings: taken as it is")
            return settings | before
    except (ValueError, KeyError, AttributeError, TypeError):
        pass   # none there, or of something else: it is replaced
    journal = Journal(lm, path.with_name(path.name + ".partial"), settings)
    metrics, samples = run(journal)
    result = settings | {"metrics": metrics, "samples": samples}
    _write(path, json.dumps(result, default=_plain), f"its metrics: {metrics}")
    journal.remove()
    return result


def _plain(value):
    """Returns what JSON has for a value that it lacks: an array of numbers, or a date of a Parquet file."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _write(path, text, what):
    """Writes a file whole or not at all; of several processes, one does."""
    import jax

    if jax.process_index() != 0:
        return
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text)
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; {what}") from error


def held_out(config, data: str = "") -> tuple[list[str], str]:
    """Returns (the held-out documents that a run is measured on, where they are from).

    The run's own are those that it is validated on: of config.data.validation, or else of config.data.train.

    Args:
      data: a prepared folder, to take its held-out documents instead.

    Raises:
      UserError: there are none.
    """
    from fm_jax.data import batches, prepared

    source = data or config.data.validation or config.data.train
    mixture = [(data, 1.0)] if data else batches.mixtures(config)[1]
    texts = [text for folder, _ in mixture for text in prepared.texts(folder, "validation")]
    if not texts:
        raise UserError(f"{source} has no held-out text; prepare it with a larger --validation_frac, or name other "
                        "data in --data")
    return texts, source


def _flags(fv):
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=fv)
    flags.DEFINE_list("tasks", ["perplexity", "next_sentence"], "tasks, patterns of them, and files, separated by "
                      "commas", flag_values=fv)
    flags.DEFINE_integer("num_fewshot", None, "worked examples before each question; default what the task says, or 3",
                         flag_values=fv, lower_bound=0)
    flags.DEFINE_integer("step", None, "of the checkpoint; default the newest", flag_values=fv)
    flags.DEFINE_string("mesh", "", "devices per axis, as in fsdp=4,tensor=2; default one device", flag_values=fv)
    flags.DEFINE_integer("limit", 0, "only the first so many documents or questions of each task; 0: all",
                         flag_values=fv, lower_bound=0)
    flags.DEFINE_string("data", "", "prepared folder whose held-out text is used; default the run's own",
                        flag_values=fv)
    flags.DEFINE_string("output", "", "folder for the results; default WORKDIR/eval/STEP", flag_values=fv)
    flags.DEFINE_bool("chat", False, "ask as chats, by the tokenizer's template", flag_values=fv)
    flags.DEFINE_string("system_instruction", "", "how a chat begins", flag_values=fv)
    flags.DEFINE_bool("fewshot_as_multiturn", None, "with --chat: worked examples are turns of it (the default), or "
                      "all is one message of the user", flag_values=fv)
    flags.DEFINE_bool("list_tasks", False, "print the tasks that there are, and no more", flag_values=fv)
    flags.DEFINE_string("print_task", "", "print the file of a task, to be edited, and no more", flag_values=fv)
    flags.DEFINE_list("compare", [], "two runs or folders of results, a b or a,b: how b differs from a, by a paired "
                      "bootstrap over their samples; evaluates nothing", flag_values=fv)
    distributed.define_flags(fv)


def main(args):
    if args.compare:
        print(_comparison(args.compare))
        return
    if args.list_tasks or args.print_task:
        print(_task_file(args.print_task) if args.print_task else _task_list(), end="")
        return
    if args.workdir is None:
        raise UserError("--workdir is required (see --help)")
    if not args.chat and (args.system_instruction or args.fewshot_as_multiturn is not None):
        raise UserError("--system_instruction and --fewshot_as_multiturn are of chats; add --chat")
    from fm_jax.evals import requests, results as results_lib
    from fm_jax.pretrained import parse_mesh

    def show(task, metrics):
        for _, _, pipeline, _, metric, _, value, error in results_lib.rows(task, {"metrics": metrics}):
            label = metric if pipeline in ("", "none") else f"{metric},{pipeline}"
            print(f"{task:<30} {label:<18} {value}" + (f" +- {error}" if error else ""), flush=True)

    chat = requests.Chat(args.system_instruction, args.fewshot_as_multiturn is not False) if args.chat else None
    with distributed.processes(args):
        evaluate(args.workdir, args.tasks, num_fewshot=args.num_fewshot, step=args.step, mesh=parse_mesh(args.mesh),
                 limit=args.limit, chat=chat, data=args.data, output=args.output,
                 cache=os.environ.get("FM_JAX_CACHE", ""), done=show)


def _task_list():
    """Returns the lines that --list_tasks prints."""
    from fm_jax.evals import names
    from fm_jax.evals.tasks import TASKS

    lines = {name: inspect.getdoc(task).splitlines()[0].removeprefix("Returns ") for name, task in TASKS.items()}
    lines |= {name: names.about(entry) for name, entry in names.index(names.FOLDER).items()}
    return "".join(f"{name:<44} {line}\n" for name, line in lines.items())


def _task_file(name):
    """Returns the text of a task's file; what it includes is in it, so that it stands alone."""
    import yaml

    from fm_jax.evals import names, yaml_task

    files = names.index(names.FOLDER)
    if name not in files:
        raise UserError(f"--print_task: {names.unknown(name, files)}")
    path = files[name].path
    text = path.read_text(encoding="utf-8")
    if "include" not in yaml.safe_load(text):
        return text

    class Dumper(yaml.SafeDumper):
        """Writes a text of several lines as such."""

    Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None))
    return yaml.dump(yaml_task.read(path), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def _comparison(folders):
    """Returns the table that --compare prints."""
    from fm_jax.evals.results import compare_folders

    if len(folders) != 2:
        raise UserError(f"--compare takes two folders, got {len(folders)}: {', '.join(folders)}")
    found, single = compare_folders(*folders)
    lines = [f"{'task':<24} {'metric':<24} {'a':>9} {'b':>9} {'b - a':>9}  95% of the bootstrap    p"]
    for task, metrics in found.items():
        lines += [f"{task:<24} {name:<24} {d.a:>9.4f} {d.b:>9.4f} {d.b - d.a:>+9.4f}  [{d.low:+.4f}, {d.high:+.4f}]  "
                  f"{d.p:>6.3f}" for name, d in metrics.items()]
    return "\n".join(lines + [f"in one folder only: {', '.join(single)}"] * bool(single))


def _joined(argv):
    """Returns a command line in which `--compare a b` is one argument."""
    at = argv.index("--compare") if "--compare" in argv else len(argv)
    two = argv[at + 1 : at + 3]
    if len(two) < 2 or two[1].startswith("-"):
        return argv
    return [*argv[:at], "--compare=" + ",".join(two), *argv[at + 3 :]]


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__, _joined(sys.argv))
