import gc

import torch

from hybrid_cache.kernels.memory import BLOCK, LARGE_PAGE, Pool, large_pages


def test_large_pages_are_aligned_zeros():
    for num_bytes in (0, 1, LARGE_PAGE, 3 * LARGE_PAGE + 5):
        memory = large_pages(num_bytes)
        assert memory.shape == (num_bytes,)
        assert memory.data_ptr() % LARGE_PAGE == 0 or num_bytes == 0
        assert memory.storage_offset() == 0
        assert memory.untyped_storage().nbytes() == num_bytes
        assert not memory.any()


def test_tensors_of_a_pool_do_not_overlap():
    pool = Pool()
    shapes = [(3, 5), (1,), (BLOCK // 8, 2), (BLOCK + 64,), (7, 7, 2)]
    tensors = [pool.empty(shape, dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, tensor in enumerate(tensors):
        assert tensor.data_ptr() % 64 == 0
        assert (tensor == number).all()


def test_a_tensor_outlives_its_pool():
    tensor = Pool().empty((1000,), torch.float32).fill_(3)
    gc.collect()
    assert (tensor == 3).all()
