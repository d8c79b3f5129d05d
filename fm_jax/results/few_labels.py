"""Few labels: a pretrained encoder, fine-tuned, against the same network from scratch and words with a linear model.

Titles of questions, twenty topics. Both networks are trained alike: the head begins as the linear probe of their
features, then all parameters are trained (arXiv:2202.10054).

Try:  python -m fm_jax.results --rows few_labels --output results
"""

import numpy as np

from fm_jax.errors import UserError
from fm_jax.results import Row, command, minilm

TITLE = "Few labels: topics of Stack Overflow titles, accuracy"
SIZES = (16, 64, 256)
SEEDS = (0, 1)
SEQ_LEN = 20                # nine titles of ten have 21 tokens at most
FEW, ALL = (32, 16), (128, 64)     # steps and batch size; with all labels most are seen once
PROBED = 4096               # labels that the probe learns from, at most
TEST = 600                  # titles, evenly spaced over those held out


def run(work, note) -> Row:
    """Returns the accuracies by number of labels."""
    from fm_jax.data.examples import Examples

    _sklearn()
    run_folder, data = minilm(work), work / "titles"
    command("prepare", "--examples", "--source=catalogue:stackoverflow_titles", "--split_by=text",
            "--validation_source=catalogue:stackoverflow_titles_test", f"--tokenizer={run_folder / 'tokenizer'}",
            f"--output={data}")
    train, held = Examples(data, "train"), Examples(data, "validation")
    test = held[np.linspace(0, len(held) - 1, TEST).astype(int)]
    labels = tuple(sorted({r["label"] for r in train[np.arange(len(train))]}))
    few, lines = _Tuned(run_folder, labels, *FEW), []
    for size in (*SIZES, len(train)):
        found = []
        whole = size == len(train)
        fit = _Tuned(run_folder, labels, *ALL) if whole else few
        for seed in SEEDS[:1] if whole else SEEDS:
            chosen = train[np.random.default_rng(seed).permutation(len(train))[:size]]
            found.append([fit.accuracy(chosen, test, seed, pretrained=True),
                          fit.accuracy(chosen, test, seed, pretrained=False), words_accuracy(chosen, test)])
            note(f"{size} labels, seed {seed}: fine-tuned {found[-1][0]:.3f}, from scratch {found[-1][1]:.3f}, TF-IDF "
                 f"{found[-1][2]:.3f}")
        lines.append([f"{size:,} labels", *(float(x) for x in np.mean(found, axis=0))])
    return Row(("", "MiniLM fine-tuned", "the same from scratch", "TF-IDF, logistic regression"), lines, list(SEEDS),
               f"Of {TEST} held-out titles. All labels: one seed, {ALL[0] * ALL[1]:,} trained on once. "
               "TF-IDF is of words and pairs of them, with the C of 1, 10 and 100 that is best on these very titles.")


class _Tuned:
    """Fine-tuning for so many steps, compiled once."""

    def __init__(self, run_folder, labels, steps, batch):
        import jax

        from fm_jax import checkpoint, config as config_lib, objectives, sharding, tokenizer as tokenizers
        from fm_jax.pretrained import Pretrained
        from fm_jax.step import Program

        theirs, _ = config_lib.load(run_folder / "config.json")
        c = config_lib.defaults()
        c.model = theirs.model
        c.objective = "fm_jax.objectives.text_heads.TextClassification"
        c.objective_args.labels = labels
        c.steps, c.batch_size, c.seq_len, c.mesh.data = steps, batch, SEQ_LEN, 1
        c.optimizer.update(learning_rate=5e-5, schedule="linear", warmup_steps="10%", final_learning_rate_frac=0.0,
                           weight_decay=0.01, b2=0.999)
        self.config = config_lib.resolve(c)
        layout = sharding.Layout(sharding.make_mesh(self.config.mesh))
        tokenizer = tokenizers.load(run_folder / "tokenizer")
        self.objective = objectives.load(self.config, tokenizer, layout)
        self.program = Program(self.config, self.objective, layout)
        self.init = jax.jit(lambda key: sharding.unbox(self.objective.init(key))[0])
        wanted = {k: v for k, v in self.program.abstract.params.items() if k in ("embed", "transformer")}
        self.pretrained = checkpoint.restore_params(run_folder, abstract=wanted)
        self.model = Pretrained(self.config, tokenizer, self.objective, None)

    def accuracy(self, records, test, seed: int, pretrained: bool) -> float:
        """Returns the share of `test` whose label is found after training on `records`."""
        import jax
        import jax.numpy as jnp

        from fm_jax.data.batches import Batches
        from fm_jax.data.mixture import Mixture
        from fm_jax.evals.probes import linear_probe

        params = self.init(jax.random.key(seed)) | (self.pretrained if pretrained else {})
        self.model.params, few = params, records[:PROBED]
        names = self.objective.labels
        probe = linear_probe(self.model.embed([r["text"] for r in few]), [names.index(r["label"]) for r in few],
                             len(names), l2=1.0)
        # The step donates its state, and these parameters begin others.
        params = jax.tree.map(jnp.copy, params) | {"head": jnp.array(probe.weight), "head_bias": jnp.array(probe.bias)}
        state = self.program.init().replace(params=params)
        batches = Batches(Mixture([_Listed(records)], seed=seed), self.objective, batch_size=self.config.batch_size,
                          num_batches=None, seed=seed)
        for step in range(self.config.steps):
            state, _ = self.program.train_step(state, self.program.place(batches.batch(step)), step)
        self.model.params = state.params
        found = self.model.classify([r["text"] for r in test])
        return float(np.mean([max(f, key=f.get) == r["label"] for f, r in zip(found, test)]))


class _Listed:
    """A source of examples: a list of them."""

    def __init__(self, records):
        self._records = records

    def __len__(self):
        return len(self._records)

    def __getitem__(self, ids):
        return [self._records[i] for i in ids]


def words_accuracy(records, test) -> float:
    """Returns that of logistic regression on TF-IDF of words and pairs, with the best C of three on `test`."""
    TfidfVectorizer, LogisticRegression = _sklearn()
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    x, z = words.fit_transform([r["text"] for r in records]), words.transform([r["text"] for r in test])
    y, gold = [r["label"] for r in records], np.array([r["label"] for r in test])
    right = lambda C: LogisticRegression(C=C, max_iter=1000).fit(x, y).predict(z) == gold
    return max(float(right(C).mean()) for C in (1, 10, 100))


def _sklearn():
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError("this row compares with scikit-learn: pip install 'fm_jax[results]'") from error
    return TfidfVectorizer, LogisticRegression
