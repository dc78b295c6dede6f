"""All claims of the papers in miniature: tables, JSON, figures.

    python experiments/claims.py            5 seeds; experiments/results/*.json, experiments/figures/*.png
    python experiments/claims.py NAME ...   some of them
    python experiments/claims.py --tables   run nothing: tables, verdicts, figures, README from the JSON files
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
