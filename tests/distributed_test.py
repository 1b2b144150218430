"""One process alone; several are in tests/launch/processes_test.py."""

from absl.testing import absltest

from nested_learning import distributed


class DistributedTest(absltest.TestCase):
  def test_one_process_waits_for_nobody(self):
    distributed.initialize()
    distributed.barrier('here')
    distributed.check_equal({'devices': 8})
    distributed.progress()
    self.assertEqual(distributed.first_does('it', lambda: 'done'), 'done')
