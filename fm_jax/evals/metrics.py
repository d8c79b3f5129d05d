"""What a task's answers are worth: metrics of one document, their aggregation, and its standard error. Layer 4.

Names and numbers are those of lm-evaluation-harness 0.4.13; `expected_calibration_error` is ours alone.
"""

from collections.abc import Callable, Sequence
import math
import random
import re
import string
from typing import NamedTuple

import numpy as np

from fm_jax.errors import UserError, choose

BOOTSTRAP_ITERS = 100_000
BOOTSTRAP_CORPUS_ITERS = 100   # of metrics that read all texts anew each time
CALIBRATION_BINS = 15          # Guo et al. 2017, "On Calibration of Modern Neural Networks", section 5


class Metric(NamedTuple):
    """A metric of a task. `options`: of exact_match."""

    name: str
    aggregation: str
    higher_is_better: bool
    options: dict


# --- Aggregations: of one item a document, float; or of rows of resampled items at once, for the bootstrap


class Aggregation(NamedTuple):
    """total(items) -> float; rows(columns, index [R, n]) -> [R], the same of items[index], None where too slow.

    `columns`: one array [n] of each part of an item. error: "analytic", "bootstrap" or "none".
    """

    total: Callable
    rows: Callable | None
    error: str


def mean(items: Sequence[float]) -> float:
    """Returns the mean, summed in order, as the harness does."""
    return sum(items) / len(items)


def weighted_mean(items: Sequence[tuple[float, float]]) -> float:
    """Returns the sum of the first parts over the sum of the second."""
    values, weights = zip(*items)
    return sum(values) / sum(weights)


def f1(items: Sequence[tuple[int, int]]) -> float:
    """Returns F1 of class 1 from (gold, predicted) of two classes; 0 where neither has a 1.

    Raises:
      UserError: other classes than 0 and 1.
    """
    golds, predicted = _classes("f1", items, binary=True)
    return float(_f1((golds, predicted), np.arange(len(golds))[None])[0])


def matthews(items: Sequence[tuple[int, int]]) -> float:
    """Returns Matthews' correlation coefficient of (gold, predicted); 0 where one side is constant.

    Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation coefficient".
    """
    golds, predicted = _classes("mcc", items)
    return float(_matthews((golds, predicted), np.arange(len(golds))[None])[0])


def brier(items: Sequence[tuple[int, np.ndarray]]) -> float:
    """Returns the mean over (gold, probabilities) of the squared distance to the gold's one-hot. Source: Brier 1950.

    Raises:
      UserError: documents with different numbers of choices.
    """
    golds, probabilities = zip(*items)
    sizes = {len(p) for p in probabilities}
    if len(sizes) > 1:
        raise UserError(f"brier_score needs one number of choices in all documents, got {sorted(sizes)}")
    return float(np.mean(np.sum((np.array(probabilities) - np.eye(sizes.pop())[list(golds)]) ** 2, axis=1)))


def calibration_error(items: Sequence[tuple[float, float]]) -> float:
    """Returns the mean gap between confidence and accuracy, of (confidence, hit) in bins of equal width, by their size.

    Source: Guo et al. 2017, equation 3.
    """
    confidences, hits = (np.array(part, np.float64) for part in zip(*items))
    # A bin holds (i / M, (i + 1) / M]; 0 itself falls in the first.
    bins = np.maximum(np.ceil(confidences * CALIBRATION_BINS).astype(int) - 1, 0)
    gaps = np.bincount(bins, hits - confidences, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(items))


def bleu(items: Sequence[tuple[str, str]]) -> float:
    """Returns corpus BLEU, 0 to 100, of (reference or references, hypothesis) by sacrebleu."""
    return _sacrebleu("corpus_bleu", items)


def chrf(items: Sequence[tuple[str, str]]) -> float:
    """Returns corpus chrF, 0 to 100, likewise."""
    return _sacrebleu("corpus_chrf", items)


def chrf_words(items: Sequence[tuple[str, str]]) -> float:
    """Returns corpus chrF++, which counts words and pairs of them too, likewise."""
    return _sacrebleu("corpus_chrf", items, word_order=2)


def ter(items: Sequence[tuple[str, str]]) -> float:
    """Returns the corpus's translation error rate, likewise."""
    return _sacrebleu("corpus_ter", items)


def _sacrebleu(name, items, **options):
    try:
        import sacrebleu
    except ImportError as error:
        raise UserError("BLEU, chrF and TER need sacrebleu: pip install sacrebleu") from error
    references, hypotheses = zip(*items)
    return getattr(sacrebleu, name)(list(hypotheses), [list(references)], **options).score


def _classes(name, items, binary=False):
    golds, predicted = (np.array(part) for part in zip(*items))
    found = {int(c) for c in golds} | {int(c) for c in predicted}
    if binary and not found <= {0, 1}:
        raise UserError(f"{name} is of the two classes 0 and 1, the task has {sorted(found)}")
    return golds, predicted


def _f1(columns, index):
    golds, predicted = (c[index] == 1 for c in columns)
    hits, either = (golds & predicted).sum(1), golds.sum(1) + predicted.sum(1)
    return 2 * hits / np.maximum(either, 1)


def _matthews(columns, index):
    golds, predicted = (c[index] for c in columns)
    n = index.shape[1]
    classes = np.union1d(*columns)
    gold_counts = np.stack([(golds == c).sum(1) for c in classes], 1).astype(np.float64)
    predicted_counts = np.stack([(predicted == c).sum(1) for c in classes], 1).astype(np.float64)
    both = (golds == predicted).sum(1) * float(n) - (gold_counts * predicted_counts).sum(1)
    spread = (n**2 - (predicted_counts**2).sum(1)) * (n**2 - (gold_counts**2).sum(1))
    return np.where(spread == 0, 0.0, both / np.sqrt(np.where(spread == 0, 1, spread)))


def _median(columns, index):
    return np.sort(columns[0][index], 1)[:, index.shape[1] // 2]


def _nanmean(columns, index):
    return np.nanmean(columns[0][index], 1)


AGGREGATIONS = {
    "mean": Aggregation(mean, lambda columns, index: columns[0][index].mean(1), "analytic"),
    "median": Aggregation(lambda items: sorted(items)[len(items) // 2], _median, "bootstrap"),
    "nanmean": Aggregation(lambda items: float(np.nanmean(items)), _nanmean, "bootstrap"),
    "perplexity": Aggregation(lambda items: math.exp(-mean(items)),
                              lambda columns, index: np.exp(-columns[0][index].mean(1)), "bootstrap"),
    "weighted_perplexity": Aggregation(
        lambda items: math.exp(-weighted_mean(items)),
        lambda columns, index: np.exp(-columns[0][index].sum(1) / columns[1][index].sum(1)), "none"),
    "bits_per_byte": Aggregation(
        lambda items: -weighted_mean(items) / math.log(2),
        lambda columns, index: -columns[0][index].sum(1) / columns[1][index].sum(1) / math.log(2), "none"),
    "f1": Aggregation(f1, _f1, "bootstrap"),
    "matthews_corrcoef": Aggregation(matthews, _matthews, "bootstrap"),
    "brier_score": Aggregation(brier, None, "none"),
    "expected_calibration_error": Aggregation(calibration_error, None, "none"),
    "bleu": Aggregation(bleu, None, "bootstrap"), "chrf": Aggregation(chrf, None, "bootstrap"),
    "chrf++": Aggregation(chrf_words, None, "bootstrap"), "ter": Aggregation(ter, None, "bootstrap"),
}
ONE_NUMBER = ("mean", "median", "nanmean", "perplexity")   # aggregations of one number a document
# {output type: {metric: (aggregation, whether higher is better)}}; the defaults are the first DEFAULTS of each.
METRICS = {
    "loglikelihood": {"perplexity": ("perplexity", False), "acc": ("mean", True)},
    "loglikelihood_rolling": {"word_perplexity": ("weighted_perplexity", False),
                              "byte_perplexity": ("weighted_perplexity", False),
                              "bits_per_byte": ("bits_per_byte", False)},
    "multiple_choice": {"acc": ("mean", True), "acc_norm": ("mean", True), "acc_bytes": ("mean", True),
                        "acc_mutual_info": ("mean", True), "exact_match": ("mean", True), "f1": ("f1", True),
                        "mcc": ("matthews_corrcoef", True), "brier_score": ("brier_score", False),
                        "expected_calibration_error": ("expected_calibration_error", False)},
    "generate_until": {"exact_match": ("mean", True), "bleu": ("bleu", True), "chrf": ("chrf", True),
                       "chrf++": ("chrf++", True), "ter": ("ter", False)},
}
DEFAULTS = {"loglikelihood": 2, "loglikelihood_rolling": 3, "multiple_choice": 2, "generate_until": 1}
EXACT_MATCH = ("regexes_to_ignore", "ignore_case", "ignore_punctuation", "ignore_numbers")


def from_fields(metric_list, output_type: str, path: str) -> tuple[Metric, ...]:
    """Returns the metrics of a task's metric_list.

    Raises:
      UserError: a metric, an aggregation or an option that is not known for the output type.
    """
    known = METRICS[output_type]
    if metric_list is None:
        return tuple(Metric(name, *known[name], {}) for name in list(known)[: DEFAULTS[output_type]])
    if not isinstance(metric_list, list) or not all(isinstance(m, dict) and "metric" in m for m in metric_list):
        raise UserError(f"{path}: metric_list must be a list of {{metric, aggregation, higher_is_better}}")
    out = []
    for given in metric_list:
        given = dict(given)
        name = choose(given.pop("metric"), known, f"{path}: metric of output_type {output_type}")
        if given.pop("hf_evaluate", False):
            raise UserError(f"{path}: metric {name}: hf_evaluate cannot be honoured, as it downloads code")
        default, higher = known[name]
        aggregation = choose(given.pop("aggregation", default), AGGREGATIONS, f"{path}: aggregation of {name}")
        if aggregation != default and (default not in ONE_NUMBER or aggregation not in ONE_NUMBER):
            raise UserError(f"{path}: aggregation {aggregation} does not fit metric {name}; leave it out")
        higher = given.pop("higher_is_better", higher)
        for option in given:
            options = EXACT_MATCH if (name, output_type) == ("exact_match", "generate_until") else ()
            if option not in options:
                raise UserError(f"{path}: metric {name} has no option {option!r}"
                                + (f" (known: {', '.join(options)})" if options else ""))
        out.append(Metric(name, aggregation, higher, given))
    return tuple(out)


def stderr(metric: Metric, items: Sequence, iters: int = BOOTSTRAP_ITERS) -> float | None:
    """Returns the standard error of a metric over documents, None where there is none.

    A mean's is its sample standard deviation over sqrt(n); of an aggregation that is no sum, the sample standard
    deviation over `iters` resamples, 1,000 (or all of fewer) drawn by each of random.Random(0), (1), ...
    """
    aggregation = AGGREGATIONS[metric.aggregation]
    if len(items) < 2 or aggregation.error == "none":
        return None
    if aggregation.error == "analytic":
        return sample_stddev(items) / math.sqrt(len(items))
    if aggregation.rows is None:
        iters = min(iters, BOOTSTRAP_CORPUS_ITERS)
    chunk = min(1000, iters)
    values = []
    for seed in range(iters // chunk):
        if aggregation.rows is None:
            rng = random.Random(seed)
            values += [aggregation.total(rng.choices(items, k=len(items))) for _ in range(chunk)]
        else:
            columns = columns_of(items)
            values += [x for index in _choices(seed, len(items), chunk) for x in aggregation.rows(columns, index)]
    return sample_stddev(values)


def sample_stddev(items: Sequence[float]) -> float:
    """Returns the standard deviation with n - 1, summed in order."""
    center = mean(items)
    return math.sqrt(sum([(x - center) ** 2 for x in items]) / (len(items) - 1))


def columns_of(items: Sequence) -> list[np.ndarray]:
    """Returns an array [n] of each part of the items, one part where they are numbers."""
    return [np.array(part) for part in (zip(*items) if isinstance(items[0], (tuple, list)) else [items])]


def _choices(seed, n, rows):
    """Yields int [R, n], together the indices that `rows` calls of random.Random(seed).choices(range(n), k=n) give.

    NumPy's Mersenne Twister draws the same 53-bit floats from the same state, and faster.
    """
    _, state, _ = random.Random(seed).getstate()
    generator = np.random.RandomState()
    generator.set_state(("MT19937", np.array(state[:-1], np.uint32), state[-1]))
    at_once = max(1, 100_000 // n)   # a block stays in the cache
    for begin in range(0, rows, at_once):
        yield np.floor(generator.random_sample((min(at_once, rows - begin), n)) * n).astype(np.int64)


# --- Metrics of one document


def choice_items(names, logprobs: Sequence[float], unconditional: Sequence[float] | None, greedy: Sequence[bool],
                 choices: list[str], gold: int | list[int]) -> dict:
    """Returns {metric: item} of a multiple-choice question.

    Args:
      logprobs: of each choice; `unconditional`: of each without the question, for acc_mutual_info.
      gold: the right choice, or the list of them where any will do.
    """
    lls = np.array(logprobs, np.float64)
    golds = gold if isinstance(gold, list) else [gold]
    hit = lambda ranked: 1.0 if int(np.argmax(ranked)) in golds else 0.0   # the first of equals
    exponentials = np.exp(lls - lls.max())
    probabilities = exponentials / exponentials.sum()
    found = {
        "acc": lambda: hit(lls), "acc_norm": lambda: hit(lls / [len(c) for c in choices]),
        "acc_bytes": lambda: hit(lls / [len(c.encode()) for c in choices]),
        "acc_mutual_info": lambda: hit(lls - np.array(unconditional)),
        "exact_match": lambda: int(any(greedy[g] for g in golds)),
        "f1": lambda: (gold, int(lls.argmax())), "mcc": lambda: (gold, int(lls.argmax())),
        "brier_score": lambda: (gold, probabilities),
        "expected_calibration_error": lambda: (float(probabilities.max()), hit(lls)),
    }
    return {name: found[name]() for name in names}


def rolling_items(names, logprob: float, text: str) -> dict:
    """Returns {metric: (natural log-probability, words or bytes)} of a text; white space at its ends makes words."""
    counts = {"word_perplexity": len(re.split(r"\s+", text))}
    return {name: (logprob, counts.get(name, len(text.encode()))) for name in names}


def exact_match(prediction: str, references: list[str], *, regexes_to_ignore: list[str] | None = None,
                ignore_case: bool = False, ignore_punctuation: bool = False, ignore_numbers: bool = False) -> float:
    """Returns 1.0 where the prediction is one of the references, after taking off what is ignored, else 0.0."""
    dropped = str.maketrans("", "", string.punctuation * ignore_punctuation + string.digits * ignore_numbers)

    def plain(text):
        for ignored in regexes_to_ignore or ():
            text = re.sub(ignored, "", text)
        return (text.lower() if ignore_case else text).translate(dropped)

    return float(plain(prediction) in [plain(r) for r in references])
