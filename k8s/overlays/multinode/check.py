"""Whether the ranks that torchrun has started on several nodes reach each other; rank 0 prints one line, JSON.

Every rank adds its number to a sum over all of them, on its GPU over NCCL where there is one, else over gloo.
"""

import json
import os

import torch
import torch.distributed as dist


def main() -> None:
    """Join the others, add up, and compare with what must come out."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    total = torch.tensor([rank], device="cuda" if gpu else "cpu")
    dist.all_reduce(total)
    # Compared in every rank: one that got something else must end in an error.
    expected = size * (size - 1) // 2
    if total.item() != expected:
        raise SystemExit(f"rank {rank} of {size}: the sum is {total.item()}, expected {expected}")
    if rank == 0:
        nodes = int(os.environ["GROUP_WORLD_SIZE"])
        print(json.dumps({"nodes": nodes, "ranks": size, "backend": dist.get_backend()}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
