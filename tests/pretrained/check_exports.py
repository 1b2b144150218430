"""Checks that transformers loads exports of the recorded models.

    python tests/pretrained/check_exports.py write FOLDER
    .reference/bin/python tests/pretrained/check_exports.py check FOLDER

The first call, with this package, exports every model of tests/pretrained/data
into FOLDER, with a config.json that is written from nothing but the model. The
second call, with torch and transformers (see record.py), compares the logits of
every export with the recorded ones.
"""

import pathlib
import sys

import numpy as np

_DATA = pathlib.Path(__file__).parent / 'data'
_TOLERANCE = 1e-4  # of logits in float32


def write(folder: pathlib.Path) -> None:
  """Exports every model."""
  from nested_learning import pretrained
  from nested_learning.pretrained import source as source_lib

  for path in sorted(_DATA.iterdir()):
    found = pretrained.load(path)
    dtypes = {n: t.dtype for n, t in found.source.tensors.items()}
    bare = {'model_type': found.source.config['model_type']}
    tensors = source_lib.make_map(bare, found.config).dump(found.params, dtypes)
    config = pretrained.to_hf_config(found.config, bare)
    source_lib.write(folder / path.name, config, tensors, {})


def check(folder: pathlib.Path) -> bool:
  """Compares every export with the recorded logits; prints the differences."""
  import torch
  import transformers

  fine = True
  for path in sorted(folder.iterdir()):
    reference = np.load(_DATA / path.name / 'reference.npz')
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
      path, dtype=torch.float32, output_loading_info=True
    )
    with torch.no_grad():
      logits = model.eval()(torch.tensor(reference['tokens'])).logits
    difference = np.abs(logits.numpy() - reference['logits']).max()
    left = [name for names in report.values() for name in names]
    fine &= bool(difference < _TOLERANCE) and not left
    print(f'{path.name}: logits differ by {difference:.1e}; {left}')
  return fine


if __name__ == '__main__':
  action, where = sys.argv[1], pathlib.Path(sys.argv[2])
  if action == 'write':
    write(where)
  else:
    sys.exit(0 if check(where) else 1)
