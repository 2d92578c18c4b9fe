"""Work ahead in threads: in order, bounded."""

from concurrent.futures import ThreadPoolExecutor

from vlm_vqa.prefetch import ordered_map


def test_results_come_in_order_and_no_more_than_a_window_is_in_memory():
    started = []
    with ThreadPoolExecutor(2) as pool:
        for taken, result in enumerate(ordered_map(pool, lambda item: started.append(item) or item, range(50), 8)):
            assert result == taken
            assert len(started) <= taken + 8
    assert len(started) == 50
