"""The papers behind a run, as BibTeX: what a model card cites.

An entry's key is its arXiv id, the one that `Objective.paper` names. Titles and authors are those of the newest
version there; the venue is where it was published, if it was.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_NEURIPS_36 = "Advances in Neural Information Processing Systems 36"
_NEURIPS_37 = "Advances in Neural Information Processing Systems 37"
_ICML = "Proceedings of the 41st International Conference on Machine Learning"
_ICLR_12 = "The Twelfth International Conference on Learning Representations"
_EMNLP = "Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing"


@dataclass(frozen=True)
class Paper:
    """One paper."""

    authors: str  # "Surname, First and Surname, First"
    year: int  # of the venue, or of the preprint
    title: str
    venue: str = ""  # empty: a preprint

    def bibtex(self, arxiv: str) -> str:
        """The entry; `arxiv` is the paper's id there."""
        surname = self.authors.split(",")[0].replace(" ", "").replace("'", "").lower()
        words = self.title.replace("-", " ").replace(":", "").split()
        word = next(word for word in words if len(word) > 2).lower()
        kind, where = ("inproceedings", "booktitle") if self.venue else ("article", "journal")
        fields = {
            "title": "{" + self.title + "}",
            "author": self.authors,
            where: self.venue or f"arXiv preprint arXiv:{arxiv}",
            "year": str(self.year),
            "url": f"https://arxiv.org/abs/{arxiv}",
        }
        lines = [f"  {name:<9} = {{{value}}}" for name, value in fields.items()]
        return f"@{kind}{{{surname}{self.year}{word},\n" + ",\n".join(lines) + "\n}"


DPO, LORA, QLORA, RSLORA, DORA = "2305.18290", "2106.09685", "2305.14314", "2312.03732", "2402.09353"
F_DPO, LD_DPO, WPO, TR_DPO, RSO = "2309.16240", "2409.06411", "2406.11827", "2404.09656", "2309.06657"

PAPERS: dict[str, Paper] = {
    DPO: Paper(
        "Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Manning, Christopher D. and Ermon, Stefano and "
        "Finn, Chelsea",
        2023,
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        _NEURIPS_36,
    ),
    "2310.13639": Paper(
        "Hejna, Joey and Rafailov, Rafael and Sikchi, Harshit and Finn, Chelsea and Niekum, Scott and Knox, W. "
        "Bradley and Sadigh, Dorsa",
        2024,
        "Contrastive Preference Learning: Learning from Human Feedback without RL",
        _ICLR_12,
    ),
    "2305.10425": Paper(
        "Zhao, Yao and Joshi, Rishabh and Liu, Tianqi and Khalman, Misha and Saleh, Mohammad and Liu, Peter J.",
        2023,
        "SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
    ),
    RSO: Paper(
        "Liu, Tianqi and Zhao, Yao and Joshi, Rishabh and Khalman, Misha and Saleh, Mohammad and Liu, Peter J. and "
        "Liu, Jialu",
        2024,
        "Statistical Rejection Sampling Improves Preference Optimization",
        _ICLR_12,
    ),
    "2310.12036": Paper(
        "Azar, Mohammad Gheshlaghi and Rowland, Mark and Piot, Bilal and Guo, Daniel and Calandriello, Daniele and "
        "Valko, Michal and Munos, R{\\'e}mi",
        2024,
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        "Proceedings of the 27th International Conference on Artificial Intelligence and Statistics",
    ),
    "2402.00856": Paper(
        "Ji, Haozhe and Lu, Cheng and Niu, Yilin and Ke, Pei and Wang, Hongning and Zhu, Jun and Tang, Jie and Huang, "
        "Minlie",
        2024,
        "Towards Efficient Exact Optimization of Language Model Alignment",
        _ICML,
    ),
    "2402.05369": Paper(
        "Chen, Huayu and He, Guande and Yuan, Lifan and Cui, Ganqu and Su, Hang and Zhu, Jun",
        2024,
        "Noise Contrastive Alignment of Language Models with Explicit Rewards",
        _NEURIPS_37,
    ),
    "2403.00409": Paper(
        "Chowdhury, Sayak Ray and Kini, Anush and Natarajan, Nagarajan",
        2024,
        "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
        _ICML,
    ),
    "2404.04656": Paper(
        "Jung, Seungjae and Han, Gunsoo and Nam, Daniel Wontae and On, Kyoung-Woon",
        2024,
        "Binary Classifier Optimization for Large Language Model Alignment",
    ),
    "2405.00675": Paper(
        "Wu, Yue and Sun, Zhiqing and Yuan, Huizhuo and Ji, Kaixuan and Yang, Yiming and Gu, Quanquan",
        2024,
        "Self-Play Preference Optimization for Language Model Alignment",
    ),
    "2408.06266": Paper(
        "D'Oosterlinck, Karel and Xu, Winnie and Develder, Chris and Demeester, Thomas and Singh, Amanpreet and "
        "Potts, Christopher and Kiela, Douwe and Mehri, Shikib",
        2024,
        "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
    ),
    "2406.08414": Paper(
        "Lu, Chris and Holt, Samuel and Fanconi, Claudio and Chan, Alex J. and Foerster, Jakob and van der Schaar, "
        "Mihaela and Lange, Robert Tjarko",
        2024,
        "Discovering Preference Optimization Algorithms with and for Large Language Models",
        _NEURIPS_37,
    ),
    "2411.15124": Paper(
        "Lambert, Nathan and Morrison, Jacob and Pyatkin, Valentina and Huang, Shengyi and Ivison, Hamish and "
        "Brahman, Faeze and Miranda, Lester James V. and Liu, Alisa and Dziri, Nouha and Lyu, Shane and Gu, Yuling "
        "and Malik, Saumya and Graf, Victoria and Hwang, Jena D. and Yang, Jiangjiang and Le Bras, Ronan and Tafjord, "
        "Oyvind and Wilhelm, Chris and Soldaini, Luca and Smith, Noah A. and Wang, Yizhong and Dasigi, Pradeep and "
        "Hajishirzi, Hannaneh",
        2024,
        "Tulu 3: Pushing Frontiers in Open Language Model Post-Training",
    ),
    "2406.05882": Paper(
        "Melnyk, Igor and Mroueh, Youssef and Belgodere, Brian and Rigotti, Mattia and Nitsure, Apoorva and "
        "Yurochkin, Mikhail and Greenewald, Kristjan and Navratil, Jiri and Ross, Jerret",
        2024,
        "Distributional Preference Alignment of LLMs via Optimal Transport",
        _NEURIPS_37,
    ),
    "2405.14734": Paper(
        "Meng, Yu and Xia, Mengzhou and Chen, Danqi",
        2024,
        "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        _NEURIPS_37,
    ),
    "2403.07691": Paper(
        "Hong, Jiwoo and Lee, Noah and Thorne, James",
        2024,
        "ORPO: Monolithic Preference Optimization without Reference Model",
        _EMNLP,
    ),
    "2401.08417": Paper(
        "Xu, Haoran and Sharaf, Amr and Chen, Yunmo and Tan, Weiting and Shen, Lingfeng and Van Durme, Benjamin and "
        "Murray, Kenton and Kim, Young Jin",
        2024,
        "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
        _ICML,
    ),
    "1807.03748": Paper(
        "van den Oord, Aaron and Li, Yazhe and Vinyals, Oriol",
        2018,
        "Representation Learning with Contrastive Predictive Coding",
    ),
    "2402.01306": Paper(
        "Ethayarajh, Kawin and Xu, Winnie and Muennighoff, Niklas and Jurafsky, Dan and Kiela, Douwe",
        2024,
        "KTO: Model Alignment as Prospect Theoretic Optimization",
        _ICML,
    ),
    F_DPO: Paper(
        "Wang, Chaoqi and Jiang, Yibo and Yang, Chenghao and Liu, Han and Chen, Yuxin",
        2024,
        "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
        _ICLR_12,
    ),
    LD_DPO: Paper(
        "Liu, Wei and Bai, Yang and Han, Chengcheng and Weng, Rongxiang and Xu, Jun and Cao, Xuezhi and Wang, Jingang "
        "and Cai, Xunliang",
        2024,
        "Length Desensitization in Direct Preference Optimization",
    ),
    WPO: Paper(
        "Zhou, Wenxuan and Agrawal, Ravi and Zhang, Shujian and Indurthi, Sathish Reddy and Zhao, Sanqiang and Song, "
        "Kaiqiang and Xu, Silei and Zhu, Chenguang",
        2024,
        "WPO: Enhancing RLHF with Weighted Preference Optimization",
        _EMNLP,
    ),
    TR_DPO: Paper(
        "Gorbatovski, Alexey and Shaposhnikov, Boris and Malakhov, Alexey and Surnachev, Nikita and Aksenov, Yaroslav "
        "and Maksimov, Ian and Balagansky, Nikita and Gavrilov, Daniil",
        2024,
        "Learn Your Reference Model for Real Good Alignment",
    ),
    LORA: Paper(
        "Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean and "
        "Wang, Lu and Chen, Weizhu",
        2022,
        "LoRA: Low-Rank Adaptation of Large Language Models",
        "The Tenth International Conference on Learning Representations",
    ),
    QLORA: Paper(
        "Dettmers, Tim and Pagnoni, Artidoro and Holtzman, Ari and Zettlemoyer, Luke",
        2023,
        "QLoRA: Efficient Finetuning of Quantized LLMs",
        _NEURIPS_36,
    ),
    RSLORA: Paper(
        "Kalajdzievski, Damjan",
        2023,
        "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
    ),
    DORA: Paper(
        "Liu, Shih-Yang and Wang, Chien-Yi and Yin, Hongxu and Molchanov, Pavlo and Wang, Yu-Chiang Frank and Cheng, "
        "Kwang-Ting and Chen, Min-Hung",
        2024,
        "DoRA: Weight-Decomposed Low-Rank Adaptation",
        _ICML,
    ),
}
# Options beside the loss that come from a paper of their own: (name, value with which it is off, paper).
_OF_OPTIONS = (
    ("f_divergence_type", "reverse_kl", F_DPO),
    ("ld_alpha", None, LD_DPO),
    ("use_weighting", False, WPO),
    ("sync_ref_model", False, TR_DPO),
)


def cited(
    papers: Iterable[str],
    options: Mapping[str, Any],
    log_ratio: bool = True,
    quantized: bool = False,
    rslora: bool = False,
    dora: bool = False,
) -> list[str]:
    """arXiv ids of what a run rests on, the objective's own first.

    Args:
        papers: `Objective.paper` of each loss.
        options: the run's options.
        log_ratio: the implicit reward is DPO's.
        quantized: the base was held in 4 bits.
        rslora, dora: variants of LoRA that were used.
    """
    ids = [paper.rpartition("arXiv:")[2] for paper in papers if "arXiv:" in paper]
    ids += [RSO] if "2305.10425" in ids else []  # the hinge is taken on log-ratios, as there
    ids += [paper for name, off, paper in _OF_OPTIONS if options.get(name, off) not in (off, None)]
    variants = ((log_ratio, DPO), (True, LORA), (rslora, RSLORA), (dora, DORA), (quantized, QLORA))
    return list(dict.fromkeys([*ids, *(paper for used, paper in variants if used)]))


def bibtex(ids: Iterable[str]) -> str:
    """The entries of these papers, in this order."""
    return "\n\n".join(PAPERS[arxiv].bibtex(arxiv) for arxiv in ids)
