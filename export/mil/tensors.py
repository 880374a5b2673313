"""MIL operations that reduce, cut, join and reorder tensors; and a classifier's labels."""

import torch

from shvit.errors import InputError

from .registry import Numbers, Operation, Operations, ints

REDUCTIONS: dict[str, Operation] = {
    "reduce_l2_norm": lambda x, dims, keep: x.square().sum(dims, keep).sqrt(),
    "reduce_log_sum_exp": lambda x, dims, keep: x.logsumexp(dims, keep),
    "reduce_max": lambda x, dims, keep: x.amax(dims, keep),
    "reduce_mean": lambda x, dims, keep: x.mean(dims, keep),
    "reduce_sum": lambda x, dims, keep: x.sum(dims, keep),
}
OPERATIONS = Operations(
    {
        name: lambda x, axes, keep_dims, f=function: f(x, _dims(x, axes), keep_dims)
        for name, function in REDUCTIONS.items()
    },
    reverse=lambda x, axes: x.flip(_dims(x, axes)),
    shape=lambda x: torch.tensor(x.shape, dtype=torch.int32),
    squeeze=lambda x, axes: x.squeeze() if axes is None else x.squeeze(ints(axes)),
    tile=lambda x, reps: x.repeat(ints(reps)),
    transpose=lambda x, perm: x.permute(ints(perm)),
)


def _dims(x: torch.Tensor, axes: Numbers | None) -> list[int]:
    return list(range(x.dim())) if axes is None else ints(axes)


@OPERATIONS.add
def reshape(x, shape):
    sizes = [x.shape[dim] if size == 0 else size for dim, size in enumerate(ints(shape))]
    return x.reshape(sizes)


@OPERATIONS.add
def expand_dims(x, axes):
    dims = ints(axes)
    for dim in sorted(dim % (x.dim() + len(dims)) for dim in dims):
        x = x.unsqueeze(dim)
    return x


@OPERATIONS.add
def concat(values, axis, interleave):
    values = [torch.as_tensor(value) for value in values]
    if not interleave:
        return torch.cat(values, int(axis))
    dim = int(axis) % values[0].dim()
    return torch.stack(values, dim + 1).flatten(dim, dim + 1)


@OPERATIONS.add
def split(x, num_splits, split_sizes, axis):
    if split_sizes is not None:
        return x.split(ints(split_sizes), int(axis))
    return x.chunk(int(num_splits), int(axis))


@OPERATIONS.add
def slice_by_index(x, begin, end, stride, begin_mask, end_mask, squeeze_mask):
    rank = x.dim()
    masks = (squeeze_mask, begin_mask, end_mask)
    drop, from_start, to_end = ([0] * rank if mask is None else ints(mask) for mask in masks)
    steps = [1] * rank if stride is None else ints(stride)
    for dim, (first, last, step) in enumerate(zip(ints(begin), ints(end), steps, strict=True)):
        size = x.shape[dim]
        if drop[dim]:
            indices = range(first % size, first % size + 1)
        else:
            indices = range(size)[slice(None if from_start[dim] else first, None if to_end[dim] else last, step)]
        x = x.index_select(dim, torch.tensor(indices, dtype=torch.int64))
    return x.squeeze([dim for dim in range(rank) if drop[dim]])


@OPERATIONS.add
def gather(x, indices, axis, batch_dims, validate_indices=None):
    dim, batch = int(axis) % x.dim(), int(batch_dims)
    if batch:
        raise InputError("gather along batches")
    indices = torch.as_tensor(indices).long()
    indices = torch.where(indices < 0, indices + x.shape[dim], indices)
    return x.index_select(dim, indices.flatten()).reshape(*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :])


@OPERATIONS.add
def classify(probabilities, classes):
    """Return the most probable label, and all probabilities by label."""
    values = probabilities.flatten().tolist()
    named = dict(zip(classes, values, strict=True))
    return max(named, key=named.__getitem__), named
