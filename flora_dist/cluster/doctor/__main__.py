# SPDX-License-Identifier: Apache-2.0
"""`python -m flora_dist.cluster.doctor`: the doctor without the rest of the command line."""

import sys

from flora_dist.cluster.doctor import add_arguments, start
from flora_dist.one_line_parser import OneLineParser

if __name__ == "__main__":
    parser = OneLineParser(prog="python -m flora_dist.cluster.doctor", description=__doc__)
    add_arguments(parser)
    sys.exit(start(parser.parse_args()))
