from pathlib import Path

import numpy as np

from serve_app.loaders.pages import drop_pages, expect_pages, map_file


def test_advice_changes_no_byte(tmp_path: Path) -> None:
    path = tmp_path / "f"
    content = np.random.default_rng(0).integers(0, 256, 70001).astype(np.uint8)
    path.write_bytes(content.tobytes())
    mapped, private = map_file(path), content.copy()
    for advise in (expect_pages, drop_pages):
        for part in (slice(0, None), slice(5000, 20001), slice(10, 20), slice(0, 0)):
            advise(mapped[part])
            advise(private[part])
        assert np.array_equal(mapped, content)
        assert np.array_equal(private, content)
