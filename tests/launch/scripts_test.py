"""Tests that scripts pass values on unchanged, and run nothing else.

The scripts run with hostile values, against stand-ins for the programs of
clouds and clusters.
"""

import contextlib
import os
import pathlib
import random
import re
import shlex
import subprocess
import sys
from unittest import mock

from absl.testing import parameterized
import pytest
import yaml

from launch import scripts
from launch import sweeps
from launch import targets
from launch.targets import jobs
from nested_learning import accelerators
from nested_learning import errors

# A shell that runs a part of a value makes the file PWNED.
_RUN = 'touch PWNED'
_VALUES = (
  f'$({_RUN})',
  f'`{_RUN}`',
  f'; {_RUN} #',
  f"'; {_RUN}; '",
  f'"; {_RUN}; "',
  f'a\n{_RUN}\n',
  *(
    f'\nEND_OF_{name}\n{_RUN}\nEND_OF_{name}_\n{_RUN}\n'
    for name in ('START', 'SCRIPT', 'MANIFEST')
  ),
  f'"$(\n{_RUN}\n)',
  f'| {_RUN} &',
  f'\\\n{_RUN}\\',
  '*?[a-z]{a,b}~ ',
  '$HOME $$ $(A) $$(A) ${A} $((1+1)) !! %j %%',
  '- k: [v, {a: "b',
  '# \t\r\x1b\x85\u2028',
  'größe ☃ 😀',
  '-x --y=z',
  '',
)
_SAFE_NAMES = (
  'Lr 3e-3',
  'a[1]',
  "it's",
  '$(touch PWNED)',
  'x;y&z',
  '-a',
  'é%j',
)


class ScriptsTest(parameterized.TestCase):
  def test_here_document_ends_with_its_mark_alone(self):
    for text in ('END', 'END\nEND_', '\nEND\n', 'a', '', *_VALUES):
      script = scripts.here_document('cat', text, 'END')
      output = subprocess.check_output(['bash', '-c', script]).decode()
      self.assertEqual(output.rstrip('\n'), text.rstrip('\n'))

  def test_null_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, 'null character'):
      scripts.quote('a\0b')

  @parameterized.parameters(
    'fast', '--a b', '--c=d\n#SBATCH -e', '', '-', '-\0'
  )
  def test_malformed_directive_is_refused(self, option):
    with self.assertRaises(errors.UserError):
      scripts.directive(option)

  @parameterized.parameters('a\nb', 'a\\b')
  def test_folder_unfit_for_logs_is_refused(self, folder):
    with self.assertRaisesRegex(errors.UserError, '--workdir='):
      scripts.log_directive(folder, '%j.log')


class FuzzTest(parameterized.TestCase):
  """Runs the scripts of all targets."""

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.bin = self.folder / 'bin'
    self.bin.mkdir()
    self.calls = self.folder / 'calls'
    # Appends its name and arguments to the calls, with separators.
    self.note = (
      f'#!/bin/bash\nprintf "%s\\0" "${{0##*/}}" "$@" >> {self.calls}\n'
      f'printf "\\1" >> {self.calls}\n'
    )
    for name in ('sudo', 'gcsfuse', 'mountpoint', 'sleep'):
      self.program(name)
    for name in ('pkill', 'pgrep'):  # no run of before is at work
      self.program(name, 'exit 1')
    # A tree in a folder with a hostile name, and a home on another machine.
    self.tree = self.folder / 'tree $(touch PWNED);\'"`'
    for name in jobs.TREE:
      (self.tree / name).mkdir(parents=True)
    self.home = self.folder / 'home'
    (self.home / 'tree').mkdir(parents=True)
    for name in ('tree.tgz', 'installed.tgz'):
      (self.home / name).touch()

  def program(self, name, body='exit 0'):
    path = self.bin / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(f'{self.note}{body}\n')
    path.chmod(0o755)
    return str(path)

  def run_script(self, script, **environment):
    self.calls.write_text('')
    process = subprocess.run(
      ['bash', '-c', script],
      env={
        'PATH': f'{self.bin}:{os.environ["PATH"]}',
        'HOME': str(self.home),
        'USER': 'me',
        'LC_ALL': 'C.UTF-8',
        **environment,
      },
      cwd=self.tree,
      capture_output=True,
      text=True,
    )
    self.assertEqual(process.returncode, 0, process.stderr)
    self.assertEmpty(list(self.folder.rglob('PWNED')))
    calls = self.calls.read_bytes().decode().split('\1')[:-1]
    return [call.split('\0')[:-1] for call in calls]

  def environment_of(self, name):
    """Returns the environment that a stand-in wrote to a file."""
    entries = (self.folder / name).read_bytes().decode().split('\0')[:-1]
    return dict(entry.partition('=')[::2] for entry in entries)

  @contextlib.contextmanager
  def launcher(self):
    """Moves the launcher to the hostile folder, with a stand-in for Python."""
    noting = self.program('python', f'env -0 > {self.folder}/environment')
    with (
      mock.patch.object(jobs, 'ROOT', self.tree),
      mock.patch.object(sys, 'executable', noting),
      mock.patch.object(os, 'getcwd', lambda: str(self.tree)),
    ):
      yield

  def job(self, values, topology, workdir='gs://bucket/a/b', **changes):
    return jobs.Job(
      name='run-a',
      arguments=tuple(f'--set=x={value}' for value in values),
      config=None,
      workdir=workdir,
      topology=topology and accelerators.find(topology),
      env={f'V{i}': value for i, value in enumerate(values)},
      **changes,
    )

  def check_environment(self, values, environment):
    for i, value in enumerate(values):
      self.assertEqual(environment[f'V{i}'], value)

  def check_tpu_vm(self, values):
    zone, project = values[:2]
    self.program(
      'gcloud',
      f"""case "$*" in
        *queued-resources*describe*) echo ACTIVE ;;
        *scp*) for file in "$@"; do
          [[ $file != *start.sh ]] || cp "$file" {self.folder}/start.sh
        done ;;
      esac""",
    )
    with self.launcher():
      job = self.job(values, 'v5e:4x4', zone=zone, project=project)
      script = targets.TARGETS['tpu-vm'](job).script
    calls = self.run_script(script)
    self.assertEqual({call[0] for call in calls}, {'gcloud'})
    for call in calls[1:]:
      if zone:
        self.assertIn(f'--zone={zone}', call)
      if project:
        self.assertIn(f'--project={project}', call)
    python = self.home / 'venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'{self.note}env -0 > {self.folder}/environment\n')
    python.chmod(0o755)
    calls = self.run_script((self.folder / 'start.sh').read_bytes().decode())
    arguments = [f'--set=x={value}' for value in values]
    self.assertEqual(
      calls[-1],
      ['python', 'launch/run.py', *arguments, '--workdir=/gs/bucket/a/b'],
    )
    known = {'pkill', 'pgrep', 'sudo', 'mountpoint', 'python'}
    self.assertEqual({call[0] for call in calls} - known, set())
    self.check_environment(values, self.environment_of('environment'))

  def check_gke(self, values):
    self.program('gcloud')
    self.program('docker')
    self.program('kubectl', f'cat > {self.folder}/manifest')
    with self.launcher():
      job = self.job(values, 'v5e:4x4', image=values[0] or 'x', queue=values[1])
      script = targets.TARGETS['gke'](job).script
    _, build, push, _ = self.run_script(script)
    image = values[0] or 'x'
    file = f'--file={self.tree}/launch/Dockerfile'
    self.assertEqual(
      build, ['docker', 'build', f'--tag={image}', file, str(self.tree)]
    )
    self.assertEqual(push, ['docker', 'push', '--', image])
    manifest = yaml.safe_load((self.folder / 'manifest').read_bytes())
    if values[1]:
      (queue,) = manifest['metadata']['labels'].values()
      self.assertEqual(queue, values[1])
    (part,) = manifest['spec']['replicatedJobs']
    pod = part['template']['spec']['template']['spec']
    (container,) = pod['containers']
    self.assertEqual(container['image'], image)
    # Kubernetes reads $$ as a dollar, and $(NAME) as a variable.
    seen = [container['command'], [e['value'] for e in container['env']]]
    for text in sum(seen, []):
      self.assertNotRegex(text, r'(?<!\$)(\$\$)*\$\(')
    command, env = ([t.replace('$$', '$') for t in texts] for texts in seen)
    self.assertEqual(command[2:-1], [f'--set=x={value}' for value in values])
    self.assertEqual(env, list(values))

  def check_slurm(self, values):
    name = random.Random(str(values)).choice(_SAFE_NAMES)
    self.program('sbatch', f'cat > {self.folder}/batch')
    self.program('srun', f'env -0 > {self.folder}/environment')
    options = [v for v in values if not re.search(r'[\x00-\x1f\x7f]', v)]
    options = [f'--comment={value}' for value in options]
    workdir = str(self.folder / 'runs' / name)
    with self.launcher():
      job = self.job(values, 'h100:1x8', workdir, sbatch=tuple(options))
      script = targets.TARGETS['slurm'](job).script
      expected = jobs.local_command(job)
    self.assertEqual(self.run_script(script), [['sbatch']])
    batch = (self.folder / 'batch').read_bytes().decode()
    directives = [
      shlex.split(line)[1:]
      for line in batch.split('\n')
      if line.startswith('#SBATCH')
    ]
    self.assertTrue(all(len(words) == 1 for words in directives), directives)
    words = [word for (word,) in directives]
    log = f'{workdir}/logs'.replace('%', '%%') + '/slurm-%j.log'
    self.assertIn(f'--output={log}', words)
    self.assertEqual([w for w in words if w.startswith('--comment')], options)
    self.assertTrue(pathlib.Path(workdir, 'logs').is_dir())
    (call,) = self.run_script(batch)
    self.assertEqual(call[3:], expected)
    self.check_environment(values, self.environment_of('environment'))

  def check_local_procs(self, values):
    workdir = str(self.folder / values[0].strip('/') / 'run')
    with self.launcher():
      job = self.job(values, None, workdir, size='1')
      script = targets.TARGETS['local-procs'](job).script
      expected = jobs.local_command(job)[1:]
    (call,) = self.run_script(script)
    self.assertEqual(call, ['python', *expected])
    self.check_environment(values, self.environment_of('environment'))

  def check_sweep(self, values):
    name = random.Random(str(values)).choice(_SAFE_NAMES)
    command = [self.program('noting'), *values]
    script = sweeps.make_array_script(
      ['a', name],
      command,
      folder=str(self.tree),
      logs=str(self.folder / name),
      options=[f'--comment={name}'],
    )
    (call,) = self.run_script(script, SLURM_ARRAY_TASK_ID='1')
    self.assertEqual(call, ['noting', *values, f'--only={name}'])

  @parameterized.parameters('tpu_vm', 'gke', 'slurm', 'local_procs', 'sweep')
  def test_every_value_arrives(self, target):
    half = len(_VALUES) // 2
    for values in (_VALUES, _VALUES[half:] + _VALUES[:half], _VALUES[::-1]):
      getattr(self, f'check_{target}')(values)

  @parameterized.parameters('tpu_vm', 'gke', 'slurm', 'local_procs', 'sweep')
  @pytest.mark.slow
  def test_every_mixture_arrives(self, target):
    draw = random.Random(target)
    letters = ['\n', "'", '"', '\\', '$(', ')', '`', ';', _RUN, ' ', 'END_OF_']
    for value in _VALUES:  # alone in every place
      getattr(self, f'check_{target}')((value, value))
    for _ in range(40):
      values = [
        ''.join(draw.choices((*letters, *_VALUES), k=draw.randrange(1, 8)))
        for _ in range(4)
      ]
      getattr(self, f'check_{target}')(tuple(values))
