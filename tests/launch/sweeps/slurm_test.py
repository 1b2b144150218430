"""Tests of the script of a Slurm array; it runs in tests/launch."""

import subprocess

from absl.testing import absltest

from launch import sweeps
from nested_learning import errors


class SlurmTest(absltest.TestCase):
  def test_task_runs_its_name_where_it_was_made(self):
    folder = self.create_tempdir('a folder').full_path
    script = sweeps.make_array_script(
      ['a=1/seed_0', 'b=$x/seed_0'], ['echo', 'it is'], folder=folder, logs='l'
    )
    output = subprocess.check_output(
      ['bash', '-c', script.replace('exec', 'pwd; exec')],
      env={'SLURM_ARRAY_TASK_ID': '1'},
      text=True,
    )
    self.assertEqual(output, f'{folder}\nit is --only=b=$x/seed_0\n')
    self.assertIn('#SBATCH --array=0-1\n', script)

  def test_refuses_what_is_no_option(self):
    for option in ('fast', '--array=0-5'):
      with self.assertRaisesRegex(errors.UserError, option):
        sweeps.make_array_script(
          ['a'], ['x'], folder='.', logs='l', options=[option]
        )


if __name__ == '__main__':
  absltest.main()
