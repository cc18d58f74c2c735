# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face Trainer: Flora by a word, its own clipping, and a check of what it trains."""
