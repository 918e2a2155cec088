"""What needs a C compiler. With one, a source that does not compile is a failure and no reason to skip."""

import pytest

from hybrid_cache.kernels.native_library import BuildError, find_compiler


def has_compiler() -> bool:
    try:
        find_compiler()
    except BuildError:
        return False
    return True


compiler_needed = pytest.mark.skipif(not has_compiler(), reason="no C compiler")
