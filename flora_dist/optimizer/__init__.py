# SPDX-License-Identifier: Apache-2.0
"""The torch optimizer: groups, state and report, assembled from the layers below."""
