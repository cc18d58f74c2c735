# SPDX-License-Identifier: Apache-2.0
"""The only collectives of the optimizer: flat messages summed over the ranks of a shard group."""
