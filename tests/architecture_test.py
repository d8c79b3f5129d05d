"""The shape of the code itself: imports go one way and are cheap, no config key is dead, some names are banned."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from fm_jax import config as config_lib
from fm_jax import sharding

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fm_jax"

# A module imports modules of layers below its own, and of its own layer only as SAME_LAYER says. "data" stands for
# data/ and all in it. A new module takes its place here.
LAYERS = (
    ("errors", "architecture", "config", "distributed", "tree", "sharding", "hlo", "storage"),
    ("audio", "chip_kernels", "kernels", "ring", "pipeline", "model", "frontends", "images", "tokenizer", "xla_flags"),
    ("objectives", "data", "optim", "checkpoint", "metrics", "ctranslate2", "gguf", "quantize"),
    ("adapt", "decode", "hf", "scoring", "compiled_step", "step", "topology"),
    ("pretrained", "evals", "engine", "roofline"),
    ("train", "evaluate", "generate", "serve", "lm_eval", "plan", "benchmark", "prepare", "report", "convert",
     "forecast", "grpo", "annotate", "shrink", "transcribe"),
    ("results",),
)
SAME_LAYER = {
    ("architecture", "errors"), ("config", "errors"), ("config", "architecture"), ("config", "storage"),
    ("distributed", "errors"), ("storage", "errors"), ("tree", "errors"), ("sharding", "errors"), ("sharding", "tree"),
    ("kernels", "chip_kernels"), ("ring", "kernels"),
    ("model", "kernels"),
    ("model", "ring"), ("model", "pipeline"), ("frontends", "kernels"),
    ("frontends", "model"),
    ("step", "compiled_step"), ("step", "adapt"), ("quantize", "optim"),
    ("objectives", "data"),   # how an error names a record
    ("plan", "forecast"),     # the command prints what this finds
    ("report", "evaluate"),   # the report runs the evaluation that the command does
    ("grpo", "train"),        # stops at the same signals
}
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "pyarrow", "matplotlib", "sentencepiece", "tokenizers",
         "tensorboardX", "tqdm", "transformers", "PIL"}


def files():
    """Returns {dotted name under fm_jax: syntax tree} of every file of the package; fm_jax/__init__.py is ""."""
    out = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return out


FILES = files()
# What `python -m` runs: each has a --help.
COMMANDS = [name for name, tree in FILES.items()
            if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)]


def imported(tree):
    """Yields (line, dotted name under fm_jax) of every import of ours, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "fm_jax":
                    yield node.lineno, alias.name.removeprefix("fm_jax").removeprefix(".")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            if node.module.split(".")[0] == "fm_jax":
                base = node.module.removeprefix("fm_jax").removeprefix(".")
                for alias in node.names:   # a module of the package, or a name of it
                    deeper = f"{base}.{alias.name}".removeprefix(".")
                    yield node.lineno, deeper if deeper in FILES else base


def layer(module):
    return next((i for i, names in enumerate(LAYERS) if module.split(".")[0] in names), None)


def test_every_module_has_its_layer():
    tops = {name.split(".")[0] for name in FILES} - {""}
    assert tops == {name for names in LAYERS for name in names}
    for name in tops:
        stated = re.search(r"Layer (\d)", ast.get_docstring(FILES[name]))
        assert not stated or int(stated[1]) == layer(name), f"fm_jax/{name}: the docstring says {stated[0]}"


def test_imports_go_down():
    wrong, used = [], set()
    for name, tree in FILES.items():
        for line, other in imported(tree):
            here, there = name.split(".")[0], other.split(".")[0]
            # `import fm_jax` is free: its `load` looks up `pretrained` when called, and so needs what is above layer 4.
            if "" in (here, there):
                assert here or there == "pretrained", f"fm_jax/__init__.py:{line} imports {other}"
                assert there or layer(here) in (2, 5), f"{name}:{line} imports fm_jax itself"
                continue
            used.add((here, there))
            if here != there and layer(there) >= layer(here) and (here, there) not in SAME_LAYER:
                wrong.append(f"fm_jax/{name.replace('.', '/')}.py:{line} (layer {layer(here)}) imports {other} "
                             f"(layer {layer(there)})")
    assert not wrong, "\n".join(wrong)
    assert SAME_LAYER <= used, f"no longer needed: {SAME_LAYER - used}"


def test_objectives_stand_alone():
    """One file is one objective: what two need goes below them, so that a new one is read on its own."""
    for name, tree in FILES.items():
        if name.startswith("objectives."):
            assert {other for _, other in imported(tree) if other.startswith("objectives")} <= {"objectives"}, name


def test_linen_stays_where_parameters_are_declared():
    def uses(tree):
        return any(isinstance(node, (ast.Import, ast.ImportFrom)) and
                   "linen" in " ".join([getattr(node, "module", None) or "", *(a.name for a in node.names)])
                   for node in ast.walk(tree))
    users = {name for name, tree in FILES.items() if uses(tree)}
    assert users and all(n in ("model", "frontends") or n.startswith("objectives.") for n in users), users


def test_no_file_is_a_drawer():
    """A name says what a file is about. `utils` says that nobody knows."""
    parts = {part for name in FILES for part in name.split(".")}
    parts |= {p.stem for folder in ("configs", "tests", "launch") for p in (ROOT / folder).rglob("*.py")}
    banned = {"util", "utils", "helper", "helpers", "manager", "base", "common", "misc"}
    assert not {part for part in parts if banned & set(part.split("_"))}


def test_no_bare_except():
    for name, tree in FILES.items():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{name}:{node.lineno}"


# --- importing is cheap ---------------------------------------------------------------------------------------------

def modules_after(code):
    """Returns the top-level modules that a fresh interpreter has loaded after `code`."""
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}\nprint('MODULES', *sys.modules)"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.rpartition("MODULES ")[2].split()}


def test_importing_loads_nothing_heavy():
    assert not modules_after("import fm_jax, fm_jax.config, fm_jax.architecture, fm_jax.errors") & HEAVY
    assert "jax" in modules_after("import fm_jax.tree")   # so the question can be answered with yes


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_heavy(command):
    loaded = modules_after(f"""import runpy
sys.argv = ["{command}", "--help"]
try:
    runpy.run_module("fm_jax.{command}", run_name="__main__")
except SystemExit as e:
    assert not e.code, e.code""")
    assert "fm_jax" in loaded and not loaded & HEAVY


# --- config keys ----------------------------------------------------------------------------------------------------

# What the code calls each section where it reads a key: `config.optimizer` is `o` in optim.py.
SECTION_NAMES = {"": {"config", "c"}, "model": {"a", "arch"}, "optimizer": {"optimizer", "o"},
                 "checkpoint": {"checkpoint", "options", "_options"}, "adapt": {"adapt", "c", "_c"}}
DERIVED = {"model.rope_frac": "rope_dim"}   # read as a property of Architecture
# Their names say all there is; a new key gets a comment.
PLAIN_KEYS = {"optimizer.b1", "optimizer.b2", "optimizer.eps", "checkpoint.keep_last", "checkpoint.asynchronous",
              "log.tensorboard", "model.vocab_size", "model.num_layers", "model.embed_dim", "model.num_heads",
              "model.norm_eps", "model.norm_bias", "model.qkv_bias", "model.attention_out_bias", "model.mlp_bias",
              "model.rope_theta", "model.logit_softcap", "model.tie_embeddings", "model.param_dtype"}


def keys():
    """Returns every key of the default config, dotted, without those of open sections."""
    def walk(section, prefix):
        for key in section:
            if f"{prefix}{key}" in config_lib.OPEN:
                continue
            if hasattr(section[key], "keys"):
                yield from walk(section[key], f"{prefix}{key}.")
            else:
                yield prefix + key
    return set(walk(config_lib.defaults(), ""))


def test_no_config_key_is_dead():
    """Every key is read as an attribute of its section, outside the files that only check and count."""
    read = set()
    for name, tree in FILES.items():
        for node in ast.walk(tree) if name not in ("config", "architecture") else ():
            if isinstance(node, ast.Attribute):
                owner = node.value
                read.add((getattr(owner, "attr", None) or getattr(owner, "id", None), node.attr))
    dead = []
    for key in keys():
        section, _, leaf = key.rpartition(".")
        if section == "mesh":   # read as a whole
            assert leaf in sharding.MESH_AXES
        elif not any((name, DERIVED.get(key, leaf)) in read for name in SECTION_NAMES.get(section, {section})):
            dead.append(key)
    assert not dead, f"nothing reads {dead}"


def test_every_config_key_is_explained():
    """A key has a comment on its line, in config.defaults or in Architecture."""
    explained, seen = set(), set()
    lines = (PACKAGE / "config.py").read_text().splitlines()
    body = next(n for n in FILES["config"].body if isinstance(n, ast.FunctionDef) and n.name == "defaults").body
    sections = {"c": ""}
    for node in body:
        if not isinstance(node, ast.Assign):
            continue
        target = next((t for t in node.targets if isinstance(t, ast.Attribute)), None)
        if target is None:   # c = ConfigDict()
            continue
        key = (sections[target.value.id] + "." + target.attr).removeprefix(".")
        for alias in node.targets:
            if isinstance(alias, ast.Name):
                sections[alias.id] = key
        seen.add(key)
        if "#" in lines[node.lineno - 1]:
            explained |= {key} if key != "mesh" else {f"mesh.{axis}" for axis in sharding.MESH_AXES}   # all in one
    lines = (PACKAGE / "architecture.py").read_text().splitlines()
    fields = next(n for n in FILES["architecture"].body if isinstance(n, ast.ClassDef)).body
    for node in fields:
        if isinstance(node, ast.AnnAssign):
            seen.add(f"model.{node.target.id}")
            if "#" in lines[node.lineno - 1]:
                explained.add(f"model.{node.target.id}")
    assert keys() <= seen, keys() - seen
    silent = keys() - explained - PLAIN_KEYS
    assert not silent, f"no comment on {sorted(silent)}"
    assert PLAIN_KEYS <= keys() - explained, f"not plain any more: {PLAIN_KEYS & explained or PLAIN_KEYS - keys()}"
