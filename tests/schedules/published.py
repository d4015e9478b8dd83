"""Bubble rates of Zero Bubble Pipeline Parallelism (Qi et al. 2023, arXiv 2401.10241): table 5, and times of table 9.

Times are milliseconds of one microbatch on a whole stage, of A100 cards. The rate is (cost - m (TF + TB + TW)) / cost,
where the cost is the longest span of a stage, from its first forward to its last operation. In 1F1B-I each chunk is one
transformer layer.
"""

from typing import NamedTuple


class Rate(NamedTuple):
    model: str
    stages: int
    microbatches: int
    f: float
    b: float
    w: float
    comm: float
    one_f_one_b: float
    interleaved: float
    zb_h1: float
    zb_h2: float
    chunks: int  # of 1F1B-I


RATES = (
    Rate("1.5B", 8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1055, 0.1585, 0.1083, 3),
    Rate("1.5B", 8, 32, 18.513, 18.086, 9.331, 0.626, 0.1985, 0.0818, 0.1242, 0.0837, 3),
    Rate("1.5B", 8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0443, 0.0674, 0.0444, 3),
    Rate("6.2B", 8, 24, 29.718, 29.444, 19.927, 0.527, 0.2347, 0.0808, 0.1323, 0.0698, 4),
    Rate("6.2B", 8, 32, 29.802, 29.428, 19.530, 0.577, 0.1898, 0.0628, 0.1045, 0.0559, 4),
    Rate("6.2B", 8, 64, 29.935, 29.621, 19.388, 0.535, 0.1091, 0.0320, 0.0554, 0.0294, 4),
    Rate("14.6B", 16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552, 0.1104, 0.1397, 0.0672, 3),
    Rate("14.6B", 16, 64, 11.307, 11.254, 8.101, 0.379, 0.2082, 0.0852, 0.1088, 0.0516, 3),
    Rate("14.6B", 16, 128, 11.325, 11.308, 8.109, 0.378, 0.1251, 0.0445, 0.0576, 0.0266, 3),
    Rate("28.3B", 32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646, 0.1493, 0.1421, 0.0641, 2),
    Rate("28.3B", 32, 128, 10.408, 10.204, 7.703, 0.408, 0.2168, 0.1164, 0.1106, 0.0490, 2),
    Rate("28.3B", 32, 256, 10.402, 10.248, 7.698, 0.460, 0.1352, 0.0624, 0.0594, 0.0257, 2),
)
