"""What a task's answers are worth: metrics of one document, their aggregation, and its standard error. Layer 4.

Names and numbers are those of lm-evaluation-harness 0.4.13; `expected_calibration_error` is ours alone, and so are
`rouge1`, `rouge2`, `rougeL` and the `f1` of generated text, which it has in the code of single tasks.
"""

import collections
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
    """A metric of a task. `options`: of exact_match, and the k of pass@k."""

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


def pearson(golds: Sequence[float], predicted: Sequence[float]) -> float:
    """Returns the correlation of two series; 0 where one is constant, of which scipy says nan."""
    return _correlation("pearsonr", golds, predicted)


def spearman(golds: Sequence[float], predicted: Sequence[float]) -> float:
    """Returns the correlation of the ranks of two series, the mean rank of those that are equal; 0 as `pearson`."""
    return _correlation("spearmanr", golds, predicted)


def _correlation(which, golds, predicted):
    from scipy import stats   # 0.5 s
    if len(golds) != len(predicted) or len(golds) < 2:
        raise UserError(f"a correlation of {len(golds)} values with {len(predicted)}: two or more, as many of each")
    constant = min(np.ptp(golds), np.ptp(predicted)) == 0
    return 0.0 if constant else float(getattr(stats, which)(golds, predicted).statistic)


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


def check(metric: Metric) -> None:
    """Returns nothing. Raises UserError where a package that the metric needs is not installed."""
    if AGGREGATIONS[metric.aggregation].total in (bleu, chrf, chrf_words, ter):
        _import_sacrebleu()


def _import_sacrebleu():
    try:
        import sacrebleu
    except ImportError as error:
        raise UserError("BLEU, chrF and TER need sacrebleu: pip install sacrebleu") from error
    return sacrebleu


def _sacrebleu(name, items, **options):
    sacrebleu = _import_sacrebleu()
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
                       "chrf++": ("chrf++", True), "ter": ("ter", False), "f1": ("mean", True),
                       "rouge1": ("mean", True), "rouge2": ("mean", True), "rougeL": ("mean", True),
                       "pass_at_k": ("mean", True)},
}
DEFAULTS = {"loglikelihood": 2, "loglikelihood_rolling": 3, "multiple_choice": 2, "generate_until": 1}
OPTIONS = {   # of metrics of generate_until
    "exact_match": ("regexes_to_ignore", "ignore_case", "ignore_punctuation", "ignore_numbers"), "pass_at_k": ("k",)}
PASS = "pass@"   # how the metrics begin that pass_at_k stands for, one of each k


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
            options = OPTIONS.get(name, ()) if output_type == "generate_until" else ()
            if option not in options:
                raise UserError(f"{path}: metric {name} has no option {option!r}"
                                + (f" (known: {', '.join(options)})" if options else ""))
        out.append(Metric(name, aggregation, higher, given))
    if any(m.name == "pass_at_k" for m in out):
        if len(out) > 1:
            raise UserError(f"{path}: pass_at_k runs answers as programs; leave the other metrics out")
        return tuple(out[0]._replace(name=f"{PASS}{k}", options={"k": k}) for k in _ks(out[0].options, path))
    return tuple(out)


def _ks(options, path):
    ks = options.get("k", [1])
    ks = ks if isinstance(ks, list) else [ks]
    if not ks or not all(type(k) is int and k > 0 for k in ks):
        raise UserError(f"{path}: pass_at_k: k={options['k']!r} must be numbers of answers, as in [1, 10]")
    return ks


def stderr(metric: Metric, items: Sequence, iters: int = BOOTSTRAP_ITERS) -> float | None:
    """Returns the standard error of a metric over documents, None where there is none.

    A mean's is its sample standard deviation over sqrt(n); of an aggregation that is no sum, the sample standard
    deviation over `iters` resamples, 1,000 (or all of fewer) drawn by each of random.Random(0), (1), ...; None of 0.
    """
    aggregation = AGGREGATIONS[metric.aggregation]
    if len(items) < 2 or aggregation.error == "none" or (aggregation.error == "bootstrap" and not iters):
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


def token_f1(prediction: str, references: list[str]) -> float:
    """Returns the best F1 of a text's words against a reference's, 0 to 1, as a bag, without case and articles.

    Source: arXiv:1606.05250, section 6.1, and its evaluation script.
    """
    def words(text):
        text = text.lower().translate(str.maketrans("", "", string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def f1_of(reference):
        ours, theirs = words(prediction), words(reference)
        if not ours or not theirs:
            return float(ours == theirs)
        return _balance((collections.Counter(ours) & collections.Counter(theirs)).total(), len(ours), len(theirs))

    return max(map(f1_of, references))


def rouge(prediction: str, references: list[str], n: int = 0) -> float:
    """Returns the best ROUGE-n F1 of a text against a reference, 0 to 1; ROUGE-L for n=0. Words are not stemmed.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", sections 2 and 3; words as in the
    package rouge-score, to which everything but a-z and 0-9 is space.
    """
    words = lambda text: re.findall("[a-z0-9]+", text.lower())
    grams = lambda ws: collections.Counter(zip(*(ws[i:] for i in range(n))))

    def of(reference):
        ours, theirs = words(prediction), words(reference)
        if not n:
            return _balance(_common_subsequence(ours, theirs), len(ours), len(theirs))
        ours, theirs = grams(ours), grams(theirs)
        return _balance((ours & theirs).total(), ours.total(), theirs.total())

    return max(map(of, references))


def word_errors(prediction: str, reference: str) -> tuple[int, int]:
    """Returns (words that must be put in, taken out or replaced to make the reference of a prediction, its words).

    Of `spoken_words` of both. Their sums' quotient is the word error rate of many texts; it may exceed 1.
    """
    ours, theirs = spoken_words(prediction), spoken_words(reference)
    return _edits(ours, theirs), len(theirs)


def character_errors(prediction: str, reference: str) -> tuple[int, int]:
    """Returns the same of characters, of the words with a space between."""
    ours, theirs = (" ".join(spoken_words(text)) for text in (prediction, reference))
    return _edits(ours, theirs), len(theirs)


_NUMERALS = dict(zip("0123456789", "zero one two three four five six seven eight nine".split()))
_SPELT = _NUMERALS | {"mr": "mister", "mrs": "missus", "dr": "doctor"}


def spoken_words(text: str) -> list[str]:
    """Returns the words of a text as one says them: in lower case, without marks and what is in brackets.

    Hyphens part words, apostrophes do not. Single digits and three titles are spelt out, in English.
    """
    text = re.sub(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>", " ", text.casefold().replace("\u2019", "'"))
    words = re.findall(r"\w+(?:'\w+)*", text.replace("_", " "))
    return [_SPELT.get(word, word) for word in words]


def _edits(a, b) -> int:
    """Returns the fewest insertions, deletions and replacements that make b of a. Source: Levenshtein 1966."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def _common_subsequence(a, b):
    """Returns the length of the longest common subsequence of two lists."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0   # of the row above, one to the left
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def _balance(common, ours, theirs):
    """Returns the F1 of a precision common / ours and a recall common / theirs."""
    return 2 * common / (ours + theirs) if common else 0.0


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Returns the chance that of k answers, drawn without return from n of which some passed, one or more passed.

    Source: arXiv:2107.03374, equation 1.
    """
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


# {metric of one generated answer: function of (answer, references, options)}
OF_ANSWER = {
    "exact_match": exact_match, "f1": token_f1, "rouge1": lambda a, refs: rouge(a, refs, 1),
    "rouge2": lambda a, refs: rouge(a, refs, 2), "rougeL": rouge,
}
