"""AlpacaEval's files of a test's own making, and what its judges see and say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from megatron_aligndistil.evaluation.alpaca_eval import DIFFICULTY, GAMED
from tests.unit.evaluation.judge_server import Body, Response, completion


def write_csv_files(
    folder: Path, rows: int, length_slope: float = 0.0, difficulty_slope: float = 0.0
) -> dict[str, Path]:
    """Difficulties, and two gamed baselines that are preferred by length and difficulty as a logistic fit has it."""
    generator = np.random.default_rng(3)
    difficulty = generator.normal(size=rows)
    gamed = ["preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline,model"]
    for model, shift in (("verbose", -1.0), ("concise", 1.0)):
        for row, (own, longer) in enumerate(zip(difficulty, shift + generator.normal(size=rows), strict=True)):
            likely = 1 / (1 + math.exp(length_slope * math.tanh(longer) - difficulty_slope * own))
            gamed.append(f"{likely},{row},{longer},{own},False,{model}")
    files = {GAMED: folder / GAMED, DIFFICULTY: folder / DIFFICULTY}
    files[GAMED].write_text("\n".join(gamed) + "\n")
    plain = [f"{row},{own}" for row, own in enumerate(difficulty)]
    files[DIFFICULTY].write_text("\n".join(["index,instruction_difficulty", *plain]) + "\n")
    return files


def shown(body: Body) -> tuple[str, str]:
    """The outputs that a judge is shown as m and M."""
    outputs = body["messages"][-1]["content"].rsplit("## Model Outputs", 1)[1].split('"output": """')[1:]
    first, second = (text.rsplit('"""', 1)[0] for text in outputs)
    return first, second


def told(share: float, tokens: tuple[str, str] = ("m", "M")) -> Response:
    """A judge's reply that gives ``tokens`` the probabilities ``share`` and the rest."""
    likely = [{"token": token, "logprob": math.log(p)} for token, p in zip(tokens, (share, 1 - share), strict=True)]
    best = max(likely, key=lambda own: float(str(own["logprob"])))
    return Response(completion(str(best["token"]), logprobs={"content": [{**best, "top_logprobs": likely}]}))


def by_length(slope: float, scale: float, body: Body) -> Response:
    """A judge that looks only at length: logistic in the tanh of the standardised difference, as the library's fit."""
    first, second = shown(body)
    return told(1 / (1 + math.exp(-slope * math.tanh((len(first) - len(second)) / scale))))
