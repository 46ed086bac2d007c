// The page of ./serve: the bar with the model, the views and the colours, and what is shown while
// there is no model yet.
//
//     GET /props  -> app.props, app.model --showView()--> the view's start(section), once
//                                                         the view's show(), each time
//
// The view is in the URL's fragment: #chat, #write, #tokens, #arena, #leaderboard. Nothing in a URL
// makes the page do more than show a view.

import * as arena from './arena.js';
import {app, element, getJson, key, say, showError} from './api.js';
import * as chat from './chat.js';
import {startSettings} from './settings.js';
import * as tokenizer from './tokenizer.js';
import * as write from './write.js';

const views = {chat, write, tokens: tokenizer, arena, leaderboard: arena.leaderboard};
const started = new Set();
const find = id => document.getElementById(id);
const tabs = [...find('tabs').children];
const viewOf = tab => tab.hash.slice(1);

async function start() {
  startTheme();
  find('alert').querySelector('button').addEventListener('click', () => showError(null));
  document.querySelector('.skip-link').addEventListener('click', event => {
    event.preventDefault();  // the fragment is the view's
    find('main').focus();
  });
  app.props = await loadProps();
  find('waiting').hidden = true;
  startModels();
  startSettings(find('settings'));
  for (const tab of tabs) {
    if (['arena', 'leaderboard'].includes(viewOf(tab))) tab.hidden = !app.props.arena;
  }
  document.body.classList.add('ready');
  window.addEventListener('hashchange', showView);
  showView();
}

// -------------------------------------------------------------------------------------------------
// Before there is a model

// The server listens before its models are loaded: until then its answer is 503.
async function loadProps() {
  for (;;) {
    try {
      return await getJson('props');
    } catch (error) {
      if (error.status === 401) await askForKey();
      else if (error.code === 'loading_model') await showWaiting('Loading the models');
      else if (error.code === 'no_answer') await showWaiting('The server does not answer');
      else throw error;
    }
  }
}

async function showWaiting(why) {
  const title = find('waiting').querySelector('p');
  if (title.textContent !== why) say(why);
  title.textContent = why;
  find('waiting').hidden = false;
  await new Promise(resolve => setTimeout(resolve, 500));
}

// Opens the dialog, unless it is open. Ends when it was closed, with a key or without.
function askForKey() {
  const dialog = find('key-dialog');
  if (!dialog.open) dialog.showModal();
  return new Promise(resolve => dialog.addEventListener('close', resolve, {once: true}));
}

document.addEventListener('key-wanted', ({detail}) => {
  find('key-dialog').querySelector('p').textContent =
    `The server says: ${detail.message.split(';')[0]}.`;
  askForKey();
});
find('key-dialog').addEventListener('submit', event => {
  event.preventDefault();
  key.set(find('key').value.trim());
  find('key').value = '';
  find('key-dialog').close();
});

// -------------------------------------------------------------------------------------------------
// The view

function showView() {
  const wanted = location.hash.slice(1);
  const isKnown = Object.hasOwn(views, wanted);
  const name = isKnown ? wanted : app.model.is_chat ? 'chat' : 'write';
  if (!isKnown) history.replaceState(null, '', `#${name}`);
  const shown = name === 'chat' && !app.model.is_chat ? 'no-chat' : name;
  for (const section of find('main').querySelectorAll(':scope > section')) {
    section.hidden = section.id !== shown;
  }
  for (const tab of tabs) {
    tab.ariaCurrent = viewOf(tab) === name ? 'page' : null;
    if (viewOf(tab) === name) document.title = `${tab.textContent} – cake`;
  }
  document.body.dataset.view = shown;
  if (shown === 'no-chat') return explainNoChat();
  if (!started.has(name)) views[name].start(find(name));
  started.add(name);
  views[name].show();
}

function explainNoChat() {
  find('no-chat').replaceChildren(
    element('h2', {}, 'No chat with this model'),
    element('p', {}, `${app.model.model} is a base model: it was trained to go on with texts. `,
            'It has no chat template, the form in which a model reads who says what.'),
    element('a', {class: 'button primary', href: '#write'}, 'Write with it'));
}

// -------------------------------------------------------------------------------------------------
// The model, and the colours

function startModels() {
  const {models} = app.props, names = models.map(({model}) => model);
  find('model').append(...names.map(name => element('option', {value: name}, name)));
  find('model').disabled = names.length === 1;
  find('model').addEventListener('change', event => {
    chooseModel(models[names.indexOf(event.target.value)]);
  });
  const last = names.indexOf(sessionStorage.getItem('model'));
  app.model = models[Math.max(0, last)];
  find('model').value = app.model.model;
}

function chooseModel(model) {
  app.model = model;
  find('model').value = model.model;
  sessionStorage.setItem('model', model.model);
  document.dispatchEvent(new CustomEvent('model-chosen'));
  showError(null);
  showView();
}

function startTheme() {
  const buttons = [...find('theme').children];
  const choose = value => {
    if (value) document.documentElement.dataset.theme = value;
    else delete document.documentElement.dataset.theme;
    for (const button of buttons) button.ariaPressed = String(button.value === value);
  };
  choose(localStorage.getItem('theme') ?? '');
  for (const button of buttons) {
    button.addEventListener('click', () => {
      localStorage.setItem('theme', button.value);
      choose(button.value);
    });
  }
}

window.addEventListener('error', event => showError(event.error));
window.addEventListener('unhandledrejection', event => showError(event.reason));
start();
