"""Trained weights: what rounding does to DAT-light, demosaicnet and DINOv2, after training and trained with it.

Models, photographs and measures are those of trained.py. Sparse models are pruned by SparseGPT and distilled as there.
Then each is rounded and measured, distilled on for SHORT, against the dense float model still, and measured again;
sparse float models too, so that what more steps give is not taken for what rounding in training gives.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from demo.photographs import HELD_OUT
from studies.fashion import converted
from studies.quantised import BASES, DENSE, FLOAT, POST, TRAINED, quantised
from studies.trained import MODELS, Study

FORMATS = (FLOAT, "int8 by token", "int8 by max", "int8 by percentile", "int4 by token")
STEPS, PACE = 30, 0.1  # of rounding in training: so many steps, and times the learning rate

Found = dict[str, dict[str, list[float]]]  # by format, the quality of each photograph, of POST and TRAINED


def formats(base: str) -> list[str]:
    return [name for name in FORMATS if name in (FLOAT, *BASES[base])]


def base_of(study: Study, base: str) -> tuple[nn.Module, nn.Module]:
    """The dense float model, and the base: itself, or pruned and distilled."""
    teacher, student = study.pair()
    if base != DENSE:
        study.prune(student, base, "sparsegpt")
        study.distil(student, teacher, study.recipe)
    return teacher, student


def runnable(model: nn.Module, base: str) -> nn.Module:
    return model if base == DENSE else converted(model)


def job(model: str, base: str) -> Found:
    """Of one model and base, on one thread."""
    torch.set_num_threads(1)
    study = MODELS[model]
    teacher, trained = base_of(study, base)
    recipe = replace(study.recipe, steps=STEPS, learning_rate=PACE * study.recipe.learning_rate)
    found: Found = {}
    for name in formats(base):
        one = quantised(trained, name, study.skip, study.calibration())
        found[name] = {POST: study.measured(runnable(one, base))}
        if (base, name) != (DENSE, FLOAT):  # which has nothing to learn from itself
            study.distil(one, teacher, recipe)
            found[name][TRAINED] = study.measured(runnable(one, base))
    return found


# ---- The table -------------------------------------------------------------------------------------------------------


def markdown(found: dict[str, dict[str, Found]]) -> str:
    """found: by model and base, what job() returned."""
    head = " | ".join(f"{model}, {MODELS[model].unit} | {TRAINED}" for model in found)
    lines = [f"| mean of {len(HELD_OUT)} photographs | {head} |", "|---" + "|--:" * 2 * len(found) + "|"]
    for base in next(iter(found.values())):
        for name in formats(base):
            cells = []
            for model, bases in found.items():
                digits = 4 if MODELS[model].unit == "cosine" else 2
                for stage in (POST, TRAINED):
                    values = bases[base][name].get(stage, [])
                    cells.append(f"{sum(values) / len(values):.{digits}f}" if values else "")
            lines.append(f"| {base}, {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
