"""All claims of the papers in miniature: tables, JSON, figures.

    python experiments/claims.py            5 seeds; experiments/results/*.json, experiments/figures/*.png
    python experiments/claims.py --quick    1 seed, shorter; out/claims/quick
    python experiments/claims.py --tables   README's tables again from the JSON files; --draw: the figures
"""

import beta
import choose
import edit_distance
import frontier
import segments
import seqkl
import weight
from common import main

CLAIMS = [choose, frontier, weight, edit_distance, seqkl, segments, beta]

if __name__ == "__main__":
    main(CLAIMS)
