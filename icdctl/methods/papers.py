"""Where the methods were published, for `icdctl list methods`."""

from __future__ import annotations

PUBLISHED_AT = {
    "https://arxiv.org/abs/1503.02531": ("NIPS workshop", 2015),
    "https://arxiv.org/abs/2203.08679": ("CVPR", 2022),
    "https://arxiv.org/abs/2303.13005": ("ICCV", 2023),
    "https://arxiv.org/abs/2403.13512": ("CVPR", 2024),
    "https://arxiv.org/abs/2509.12553": ("arXiv", 2025),
    "https://arxiv.org/abs/2408.07703": ("ICCV", 2025),
    "https://arxiv.org/abs/2512.04625": ("TNNLS", 2026),
    "https://arxiv.org/abs/2507.15911": ("ICCV", 2025),
    "https://arxiv.org/abs/2402.11148": ("ICLR", 2024),
    "https://arxiv.org/abs/2505.04560": ("ICML", 2025),
    "https://arxiv.org/abs/2308.00520": ("arXiv", 2023),
    "https://arxiv.org/abs/2205.10536": ("NeurIPS", 2022),
    "https://github.com/HyunJunSik/StreamLined": ("CVPR", 2026),
    "https://github.com/GzyAftermath/CAT-KD": ("CVPR", 2023),
    "https://arxiv.org/abs/1412.6550": ("ICLR", 2015),
    "https://arxiv.org/abs/1612.03928": ("ICLR", 2017),
    "https://arxiv.org/abs/1707.01219": ("arXiv", 2017),
    "https://arxiv.org/abs/1907.09682": ("ICCV", 2019),
    "https://arxiv.org/abs/1904.01802": ("ICCV", 2019),
    "https://arxiv.org/abs/1803.10837": ("ECCV", 2018),
    "https://arxiv.org/abs/1904.05068": ("CVPR", 2019),
    "Yim et al., CVPR 2017": ("CVPR", 2017),
    "https://arxiv.org/abs/1807.06819": ("ECCV", 2018),
    "https://arxiv.org/abs/1811.03233": ("AAAI", 2019),
    "https://arxiv.org/abs/1904.01866": ("ICCV", 2019),
    "https://arxiv.org/abs/1904.05835": ("CVPR", 2019),
    "https://arxiv.org/abs/1802.04977": ("NeurIPS", 2018),
    "https://arxiv.org/abs/2104.09044": ("CVPR", 2021),
    "https://arxiv.org/abs/1910.10699": ("ICLR", 2020),
    "https://arxiv.org/abs/2403.01427": ("CVPR", 2024),
    "https://arxiv.org/abs/2311.13621": ("ICCV", 2025),
}
"""A method's source -> where and when it was published."""
