"""The first five losses of every config's tiny model, held to text files in golden/.

    python tests/golden_test.py            # rewrites golden/*.txt; say in the commit why they changed

A line is a step: its loss and its gradient norm. One random batch from a fixed seed is learned by heart, so that
the losses also move with the optimizer and its schedule.
"""

import pathlib
import sys

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "finetune")   # whose model is a run's
STEPS = 5
# Machines differ in the order of float32 sums: about 1e-6 at first, a few times that after five updates. A learning
# rate 5% off shows in the losses as 1e-3.
RTOL_LOSS, RTOL_NORM = 2e-4, 2e-3


def path(name):
    return ROOT / "tests" / "golden" / f"{name}.txt"


def measure(name):
    """Returns float64 [STEPS, 2]: loss and gradient norm of each step."""
    from fm_jax import config as config_lib
    from fm_jax import objectives, sharding
    from fm_jax.step import Program

    spec = f"{ROOT / 'configs' / name}.py:tiny"
    config = config_lib.resolve(config_lib.from_file(spec, {"steps": STEPS, "optimizer.decay_steps": 2}))
    layout = sharding.Layout(sharding.make_mesh({"data": 1}))
    program = Program(config, objectives.load(config, None, layout), layout)
    batch = program.place(program.objective.random_batch(config.batch_size, np.random.default_rng(0)))
    state, rows = program.init(), []
    for step in range(STEPS):
        state, metrics = program.train_step(state, batch, step)
        (total, weight), (norm, _) = jax.device_get((metrics["loss"], metrics["grad_norm"]))
        rows.append((total / weight, norm))
    return np.array(rows, np.float64)


@pytest.mark.parametrize("name", CONFIGS)
def test_five_steps_give_the_golden_losses(name):
    assert path(name).exists(), f"no golden losses of configs/{name}.py: run python tests/golden_test.py"
    got, want = measure(name), np.loadtxt(path(name), ndmin=2)
    np.testing.assert_allclose(got[:, 0], want[:, 0], rtol=RTOL_LOSS)
    np.testing.assert_allclose(got[:, 1], want[:, 1], rtol=RTOL_NORM)
    assert got[-1, 0] < got[0, 0]


def test_every_golden_file_has_its_config():
    assert sorted(p.stem for p in (ROOT / "tests" / "golden").glob("*.txt")) == CONFIGS


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    jax.config.update("jax_platforms", "cpu")
    for config_name in CONFIGS:
        path(config_name).parent.mkdir(exist_ok=True)
        np.savetxt(path(config_name), measure(config_name), fmt="%.7g",
                   header=f"loss, gradient norm of each step of configs/{config_name}.py:tiny; see golden_test.py")
        print(path(config_name).read_text())
