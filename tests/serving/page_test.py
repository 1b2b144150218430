"""Test of the page in headless Chromium."""

import pathlib
import re
import shutil
import socket
import threading

from absl.testing import absltest
import pytest

from nested_learning import serving
from tests import compiling
from tests.serving import tiny

pytestmark = pytest.mark.extra
pytest.importorskip('fastapi', reason='pip install nested-learning[serve]')
uvicorn = pytest.importorskip('uvicorn')
sync_api = pytest.importorskip('playwright.sync_api')

_CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')


@pytest.mark.skipif(_CHROMIUM is None, reason='needs chromium')
class PageTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    from nested_learning.serving import app

    self.enterContext(compiling.quickly())
    folder = pathlib.Path(self.create_tempdir().full_path)
    self.worker = serving.Worker(lambda: tiny.make_service(folder))
    self.addCleanup(self.worker.stop)
    listener = socket.create_server(('127.0.0.1', 0))
    config = uvicorn.Config(app.make_app(self.worker), log_level='warning')
    server = uvicorn.Server(config)
    thread = threading.Thread(
      target=server.run, kwargs={'sockets': [listener]}, daemon=True
    )
    thread.start()

    def stop():
      server.should_exit = True
      thread.join()

    self.addCleanup(stop)
    playwright = self.enterContext(sync_api.sync_playwright())
    browser = playwright.chromium.launch(
      executable_path=_CHROMIUM, args=['--no-sandbox']
    )
    self.addCleanup(browser.close)
    self.page = browser.new_page()
    self.page.set_default_timeout(60_000)
    self.errors = []
    self.page.on('pageerror', lambda error: self.errors.append(str(error)))
    self.page.goto(f'http://127.0.0.1:{listener.getsockname()[1]}/')

  def test_chat_see_the_levels_fork_and_roll_back(self):
    page, expect = self.page, sync_api.expect
    expect.set_options(timeout=60_000)  # programs are compiled
    sessions, log = page.locator('#sessions button'), page.locator('#audit tr')
    page.fill('#name', '<b>me</b>')
    page.click('#create')
    expect(sessions).to_have_text(['<b>me</b> · 0'])
    page.fill('#text', 'ab' * 14)
    page.click('text=Only read')
    expect(sessions).to_have_text(['<b>me</b> · 29'])
    expect(page.locator('#levels tr').nth(1)).to_contain_text(
      re.compile('^fast7')
    )
    page.fill('#text', 'hello')
    page.fill('#tokens', '3')
    page.click('text=Send')
    expect(page.locator('.message')).to_have_count(3)
    expect(log.nth(1)).to_contain_text(re.compile('^chat'))
    expect(page.locator('#losses polyline')).to_have_count(1)
    expect(page.locator('#axes')).to_contain_text('nats per token')
    after = sessions.first.text_content()
    page.click('[data-do=fork]')
    expect(sessions).to_have_count(2)
    page.click('[data-do=rollback]')
    expect(page.locator('#error')).to_contain_text('nothing to return to')
    sessions.first.click()
    expect(sessions.first).to_have_attribute('aria-current', 'true')
    page.click('[data-do=rollback]')
    expect(sessions.first).to_have_text('<b>me</b> · 29')
    expect(sessions.last).to_have_text(after.replace('<b>me</b>', 'fork'))
    page.click('[data-do=reset]')
    expect(page.locator('#levels tr').nth(1)).to_contain_text('0.00 %')
    page.click('[data-do=delete]')
    expect(sessions).to_have_count(1)
    self.assertEqual(self.errors, [])
