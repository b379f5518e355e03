import shutil

import pytest

from bellbit.kernels import native


@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler here")
def test_the_kernels_are_built_where_there_is_a_compiler():
    """An install without them succeeds all the same, so that a fault in their sources would pass unseen."""
    assert native.available()
    assert native.available()[-1] == "portable"
