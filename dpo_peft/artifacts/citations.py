"""The papers behind a run, as BibTeX: what a model card cites. The entries are in references.bib, by arXiv id."""

import logging
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

DPO, LORA, QLORA, RSLORA, DORA = "2305.18290", "2106.09685", "2305.14314", "2312.03732", "2402.09353"
F_DPO, LD_DPO, WPO, TR_DPO, RSO = "2309.16240", "2409.06411", "2406.11827", "2404.09656", "2309.06657"

# Options beside the loss that come from a paper of their own: (name, value with which it is off, paper).
_OF_OPTIONS = (
    ("f_divergence_type", "reverse_kl", F_DPO),
    ("ld_alpha", None, LD_DPO),
    ("use_weighting", False, WPO),
    ("sync_ref_model", False, TR_DPO),
)


@cache
def papers() -> dict[str, str]:
    """Returns arXiv id -> BibTeX entry."""
    text = Path(__file__).with_name("references.bib").read_text("utf-8")
    entries = re.findall(r"^@.*?^\}", text, flags=re.MULTILINE | re.DOTALL)
    return {re.findall(r"arxiv\.org/abs/([\d.]+)", entry)[0]: entry for entry in entries}


def cited(
    sources: Iterable[str],
    options: Mapping[str, object],
    log_ratio: bool = True,
    quantized: bool = False,
    rslora: bool = False,
    dora: bool = False,
) -> list[str]:
    """Returns the arXiv ids of what a run rests on, the objective's own first.

    Args:
        sources: `Objective.paper` of each loss.
        options: the run's options.
        log_ratio: the implicit reward is DPO's.
        quantized: the base was held in 4 bits.
        rslora, dora: variants of LoRA that were used.
    """
    ids = [source.rpartition("arXiv:")[2] for source in sources if "arXiv:" in source]
    ids += [RSO] if "2305.10425" in ids else []  # the hinge is taken on log-ratios, as there
    ids += [paper for name, off, paper in _OF_OPTIONS if options.get(name, off) not in (off, None)]
    variants = ((log_ratio, DPO), (True, LORA), (rslora, RSLORA), (dora, DORA), (quantized, QLORA))
    return list(dict.fromkeys([*ids, *(paper for used, paper in variants if used)]))


def bibtex(ids: Iterable[str]) -> str:
    """Returns the entries of these papers, in this order. One that references.bib lacks is left out and logged."""
    found = []
    for arxiv in ids:
        if arxiv in papers():
            found.append(papers()[arxiv])
        else:
            logger.info("arXiv:%s is not cited in the model card: references.bib has no entry for it.", arxiv)
    return "\n\n".join(found)
