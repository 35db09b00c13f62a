"""Figures that can be compared with figures in papers: METEOR, and the figures of COCO's evaluation.

pycocoevalcap contains two Java programs for the parts that Python cannot compute. Stanford's tokenizer splits the texts
as COCO's evaluation does, and METEOR's program aligns words. Each Java program runs once and reads all rows.

In the names of arrays, R stands for rows (a picture and a prompt), S for resamples, K for METEOR's statistics, and M
for the kinds of matches.

Sources: https://github.com/salaniz/pycocoevalcap; Denkowski and Lavie, "Meteor Universal" (2014).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from pycocoevalcap.meteor import meteor as meteor_program
from pycocoevalcap.tokenizer import ptbtokenizer as ptb_program

from pipelines.driver.evaluate.metrics import COCO_PREFIX, Floats, Metric, ScoredRow, ngram_metrics
from pipelines.errors import StageFailed
from vlm.text.words import words

Corpus = tuple[list[list[str]], list[list[list[str]]]]
"""Captions, and the references of each caption. All texts are split into words."""
LINE_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Pattern of the characters that a Java program may take for the end of a line."""
STATISTICS = 23
"""Number of METEOR's statistics per row: 4 lengths, 4 counts for each of 4 kinds of matches, the number of chunks, and
2 sums of matches."""
MATCH_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
"""Weights of the four kinds of matches: exact word, stem, synonym and paraphrase (METEOR 1.5, English)."""
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
"""METEOR 1.5's parameters for English: weight of recall, exponent and factor of the fragmentation penalty, and weight
of content words."""


def has_java() -> bool:
    """Return whether Java is installed. The metrics of this module need Java."""
    return shutil.which("java") is not None


def java_metrics(scored: Sequence[ScoredRow]) -> dict[str, Metric]:
    """Return the metrics that need Java: `meteor` and the figures of COCO's evaluation (`coco_*`).

    `meteor` compares words as `vlm.text.words` splits them. The Java program stems English words, but breaks words of
    other scripts, such as Chinese, into pieces. A word that is not ASCII is therefore replaced by a code, which matches
    only the code of the same word.
    """
    codes: dict[str, str] = {}

    def ascii_words(text: str) -> list[str]:
        return [word if word.isascii() else codes.setdefault(word, f"q{len(codes)}q") for word in words(text)]

    own = (
        [ascii_words(item.caption or "") for item in scored],
        [[ascii_words(reference) for reference in item.references] for item in scored],
    )
    coco = _split_as_coco(scored)
    own_meteor, coco_meteor = meteor(own, coco)
    metrics = ngram_metrics(*coco) | {"meteor": coco_meteor}
    return {"meteor": own_meteor} | {f"{COCO_PREFIX}{name}": metric for name, metric in metrics.items()}


def _split_as_coco(scored: Sequence[ScoredRow]) -> Corpus:
    texts = [text for item in scored for text in (item.caption or "", *item.references)]
    split = iter(ptb_words(texts))
    rows = [(next(split), [next(split) for _ in item.references]) for item in scored]
    return [caption for caption, _ in rows], [references for _, references in rows]


def ptb_words(texts: Iterable[str]) -> list[list[str]]:
    """Split texts into words as COCO's evaluation does, with Stanford's tokenizer and without punctuation."""
    program = ["-cp", ptb_program.STANFORD_CORENLP_3_4_1_JAR, "edu.stanford.nlp.process.PTBTokenizer"]
    options = ["-preserveLines", "-lowerCase"]
    lines = _run_java(ptb_program.__file__, [*program, *options], [LINE_BREAKS.sub(" ", text) for text in texts])
    punctuation = set(ptb_program.PUNCTUATIONS)
    return [[word for word in line.rstrip().split(" ") if word and word not in punctuation] for line in lines]


def meteor(*corpora: Corpus) -> list[Metric]:
    """Return METEOR of each corpus, computed from the sums of the statistics of all rows (not as a mean over rows).

    The Java program aligns each caption with its best reference. The Java program takes seconds to start, so it runs
    only once for all corpora.
    """
    requests = [
        " ||| ".join(["SCORE", *(_spaced(reference) for reference in group), _spaced(caption)])
        for captions, references in corpora
        for caption, group in zip(captions, references, strict=True)
    ]
    program = ["-Xmx2G", "-jar", meteor_program.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
    lines = _run_java(meteor_program.__file__, program, requests)
    statistics_RK = np.array([line.split() for line in lines], float).reshape(len(requests), STATISTICS)
    # METEOR has no penalty for a caption that equals its reference, because such a caption is not fragmented.
    same_R = (statistics_RK[:, [0, 1]] == statistics_RK[:, [21, 22]]).all(axis=1) & (statistics_RK[:, 20] == 1)
    statistics_RK[same_R, 20] = 0
    ends = np.cumsum([len(captions) for captions, _ in corpora])
    return [partial(_weighted_meteor, part_RK) for part_RK in np.split(statistics_RK, ends[:-1])]


def _weighted_meteor(statistics_RK: Floats, weights_SR: Floats) -> Floats:
    return meteor_score(weights_SR @ statistics_RK)


def meteor_score(statistics_SK: Floats) -> Floats:
    """Compute METEOR from sums of the statistics that METEOR's Java program gives for each row."""
    caption_length, reference_length, caption_function, reference_function = statistics_SK[:, :4].T
    # Each kind of match has four counts: content words of the caption and of the reference, then function words of the
    # caption and of the reference.
    counts_SMK = statistics_SK[:, 4:20].reshape(-1, 4, 4)
    matches_S2 = np.einsum("m,smk->sk", MATCH_WEIGHTS, DELTA * counts_SMK[..., :2] + (1 - DELTA) * counts_SMK[..., 2:])
    chunks, caption_matches, reference_matches = statistics_SK[:, 20:].T
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = (
            matched / (DELTA * (length - function) + (1 - DELTA) * function)
            for matched, length, function in (
                (matches_S2[:, 0], caption_length, caption_function),
                (matches_S2[:, 1], reference_length, reference_function),
            )
        )
        mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        fragmentation = 2 * chunks / (caption_matches + reference_matches)
        score = mean * (1 - GAMMA * fragmentation**BETA)
    return np.asarray(np.nan_to_num(score, nan=0.0))


def _spaced(text_words: Sequence[str]) -> str:
    return " ".join(text_words).replace("|||", "")


def _run_java(module: str, arguments: Sequence[str], lines: Sequence[str]) -> list[str]:
    """Run a Java program of pycocoevalcap on lines of text, and return the program's answers, one answer for each line.

    Args:
        module: path of the Python module in whose folder the Java program is.
        arguments: arguments of the `java` command.
        lines: texts without line breaks.

    Raises:
        StageFailed: Java failed, or the number of answers differs from the number of lines.
    """
    command = ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", *arguments]
    text = "".join(f"{line}\n" for line in lines).encode()
    folder = Path(module).parent
    done = subprocess.run(command, input=text, capture_output=True, cwd=folder, check=False)  # noqa: S603
    answers = done.stdout.decode().removesuffix("\n").split("\n")
    if done.returncode or len(answers) != len(lines):
        raise StageFailed(
            "a Java program of pycocoevalcap failed",
            where=" ".join(command),
            got=f"exit code {done.returncode}, {len(answers)} output lines for {len(lines)} "
            f"input lines: {done.stderr.decode(errors='replace')[-500:]}",
            fix="install Java 8 or newer with 2 GB of memory, or remove Java from PATH to leave out the metrics "
            "that need Java",
        )
    return answers
