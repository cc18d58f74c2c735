# SPDX-License-Identifier: Apache-2.0
"""Hosts whose tensors are not what they seem: DeepSpeed, FSDP1, DDP's hook."""
