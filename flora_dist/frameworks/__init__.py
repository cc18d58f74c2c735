# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed, FSDP1 and DDP's hook: frameworks that hold tensors in forms of their own."""
