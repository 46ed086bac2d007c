"""The views of the page of ./serve in a browser, each with something in it: for dev/screenshots.py
and dev/axe.py. Chromium is steered over the WebDriver protocol, with Python's own library alone.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

ENTER = '\ue007'
NAMES = ('chat', 'write', 'tokens', 'arena', 'leaderboard')


class Browser:
    """Chromium without a window. `folder` holds what the programs would leave in a home."""

    def __init__(self, folder):
        for name in ('chromium', 'chromedriver'):
            if not shutil.which(name):
                sys.exit(f'error: {name} is not installed: dev/setup.sh --all')
        env = {**os.environ, 'HOME': folder, 'TMPDIR': folder}
        self.driver = subprocess.Popen(['chromedriver', '--port=0'], stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL, text=True, env=env)
        port = next(int(found[1]) for found in (
            re.search(r'successfully on port (\d+)', line) for line in self.driver.stdout) if found)
        self.connection = http.client.HTTPConnection('127.0.0.1', port, timeout=120)
        self.session = '/session'
        # Chromium ends with chromedriver, because it reads its orders from a pipe.
        args = ['--headless', '--remote-debugging-pipe', '--disable-gpu', '--hide-scrollbars',
                '--disable-dev-shm-usage', '--force-prefers-reduced-motion', '--lang=en-US',
                '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']
        if os.geteuid() == 0:
            args.append('--no-sandbox')
        options = {'binary': shutil.which('chromium'), 'args': args}
        self.session += '/' + self.call('POST', '', {'capabilities': {'alwaysMatch': {
            'browserName': 'chrome', 'goog:chromeOptions': options,
            'timeouts': {'script': 90000}}}})['sessionId']

    def close(self):
        self.driver.kill()
        self.driver.wait()

    def call(self, method, path, body=None):
        self.connection.request(method, self.session + path,
                                None if body is None else json.dumps(body),
                                {'Content-Type': 'application/json'})
        reply = self.connection.getresponse()
        value = json.loads(reply.read())['value']
        if reply.status != 200:
            raise RuntimeError(f"{path}: {value['message']}")
        return value

    def devtools(self, command, **parameters):
        return self.call('POST', '/goog/cdp/execute', {'cmd': command, 'params': parameters})

    def open(self, url):
        self.call('POST', '/url', {'url': url})

    def run(self, body, *arguments):
        return self.call('POST', '/execute/sync', {'script': body, 'args': arguments})

    def wait(self, expression, seconds=40):
        """Waits until a JavaScript expression is true in the page, and returns its value."""
        found = self.run(f'''
            const end = performance.now() + {seconds * 1000};
            return new Promise(resolve => {{
              const test = () => {{
                let value = null, problem = null;
                try {{ value = ({expression}); }} catch (error) {{ problem = String(error); }}
                if (value) resolve({{value}});
                else if (performance.now() > end) {{
                  resolve({{problem, text: document.body.innerText}});
                }} else setTimeout(test, 20);
              }};
              test();
            }});''')
        if 'value' not in found:
            raise RuntimeError(f"found no {expression} ({found['problem']}) in:\n{found['text']}")
        return found['value']

    def element(self, selector):
        self.wait(f'document.querySelector({json.dumps(selector)})')
        found = self.call('POST', '/element', {'using': 'css selector', 'value': selector})
        return '/element/' + next(iter(found.values()))

    def click(self, selector):
        self.call('POST', self.element(selector) + '/click', {})

    def type(self, selector, text):
        self.call('POST', self.element(selector) + '/value', {'text': text})

    def look(self, width=1200, height=900, dark=False):
        """The size of the page's area, and the colours that the system asks for."""
        self.devtools('Emulation.setDeviceMetricsOverride', width=width, height=height,
                      deviceScaleFactor=1, mobile=False)
        self.devtools('Emulation.setEmulatedMedia', features=[
            {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}])

    def screenshot(self, whole=False):
        """PNG in base64. `whole`: what is below the window, too."""
        return self.devtools('Page.captureScreenshot', captureBeyondViewport=whole)['data']


@contextlib.contextmanager
def serving(models, serve='./serve', arena=True, flags=()):
    """./serve with these models, on a free port; `arena`: with votes of its own. Its address."""
    with tempfile.TemporaryDirectory() as folder:
        votes = ['--votes', folder + '/votes.db'] if arena else []
        process = subprocess.Popen(
            [serve, *models, '--port', '0', '--threads', '1', *votes, *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                found = re.search(r'http://127\.0\.0\.1:\d+', line)
                if found:
                    yield found[0]
                    return
            sys.exit('error: found no address in the output of serve:\n' + ''.join(lines))
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def browsing():
    # Chromium may still write while the folder is removed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(folder)
        try:
            yield browser
        finally:
            browser.close()


def post(address, path, body):
    connection = http.client.HTTPConnection(address.removeprefix('http://'), timeout=120)
    connection.request('POST', path, json.dumps(body), {'Content-Type': 'application/json'})
    reply = connection.getresponse()
    value = json.loads(reply.read())
    if reply.status != 200:
        raise RuntimeError(f'{path}: {value}')
    return value


def prepare(browser, address, view):
    """Opens a view and fills it step by step, as a person would: yields the name of each step."""
    browser.open('about:blank')
    browser.open(f'{address}/#{view}')
    browser.wait(f"!document.querySelector('#{view}').hidden")
    yield from globals()[f'fill_{view}'](browser, address)


def fill_chat(browser, _):
    yield 'empty'
    message = '#chat textarea[aria-label=Message]'
    for text in ('Ada has 12 cups. Ada finds 5 more. How many cups does Ada have now?',
                 'And what is the capital of France?'):
        browser.type(message, text + ENTER)
        browser.wait("document.querySelector('#chat .dock .primary').textContent === 'Send'")
    browser.click('#chat article:last-of-type [data-action=Regenerate]')
    browser.wait("document.querySelector('#chat .dock .primary').textContent === 'Send'")
    yield 'answered'
    browser.click('#chat article:last-of-type [data-action=Tokens]')
    browser.wait("document.querySelector('#chat .prose [data-index]')")
    browser.run("[...document.querySelectorAll('#chat .prose [data-index]')].at(-2).focus()")
    yield 'tokens'
    browser.run("document.activeElement.blur(); document.querySelector('#chat [role=log] ~ details > summary').click()")
    browser.wait("document.querySelector('#chat .token-view [data-index]')")
    browser.click('#open-settings')
    browser.wait("document.querySelector('#settings .picture table')")
    yield 'settings'
    browser.click('#open-settings')


def fill_write(browser, _):
    yield 'empty'
    browser.type('#write textarea', 'The quick brown')
    browser.click('#write .dock .primary')
    browser.wait("document.querySelectorAll('#write .prose [data-index]').length > 3")
    browser.wait("document.querySelector('#write .dock .primary').hidden === false")
    yield 'written'
    browser.run("document.querySelectorAll('#write .prose [data-index]')[4].focus()")
    yield 'alternatives'
    browser.click('#open-settings')
    browser.wait("document.querySelector('#settings .picture table')")
    yield 'settings'
    browser.click('#open-settings')


def fill_tokens(browser, _):
    browser.wait("document.querySelector('#tokens .token-view [data-index]')")
    browser.run("document.querySelectorAll('#tokens .token-view [data-index]')[5].focus()")
    yield 'text'


def fill_arena(browser, _):
    yield 'empty'
    browser.type('#arena textarea', 'What is the capital of France?' + ENTER)
    browser.wait("document.querySelector('#arena .dock button:not(:disabled) kbd')")
    yield 'answered'
    browser.click('#arena .dock button')
    browser.wait("document.querySelector('#arena .dock').textContent.includes('is stored')")
    yield 'voted'


def fill_leaderboard(browser, address):
    browser.wait("document.querySelector('#leaderboard').textContent.includes('ten votes')")
    yield 'hidden'
    voter = browser.run('return localStorage.voter')
    for i in range(24):
        battle = post(address, '/arena/battle', {'voter': voter, 'messages': [
            {'role': 'user', 'content': f'Ada has {i + 3} cups and finds 5 more. How many now?'}]})
        if 'same' not in battle:
            post(address, '/arena/vote', {
                'battle': battle['battle'], 'token': battle['token'], 'good': [True, True],
                'vote': ('left', 'right', 'tie', 'left', 'left')[i % 5]})
    browser.open('about:blank')
    browser.open(f'{address}/#leaderboard')
    browser.wait("document.querySelector('#leaderboard table')")
    yield 'ratings'
