// Chat: a conversation of which every message may have several versions.
//
// It is a tree of nodes {role, next, chosen}: `next` are the versions of the message behind a node,
// and next[chosen] is shown. New answers and edited messages stand beside the older ones.
//     user       text
//     assistant  parts: [{kind: 'content' or 'reasoning', text},
//                        {kind: 'tool', name, arguments, result, turn}]
//                ids (the answer's tokens, of the model `weights`), finish, tokens, speed, ...
// What goes on with an answer sends its ids (answer_ids), so that none of its tokens changes. The
// server then returns the whole answer, read from its first id.

import {app, element, postJson, say, showError, streamEvents} from './api.js';
import {colouringControls, ScoredTokens} from './scores.js';
import {sampling, showNext} from './settings.js';
import {formatNumber, markStretches, sourceKey, TokenView} from './tokens.js';

const newNode = (role, more) => ({role, next: [], chosen: 0, ...more});
let state = {system: '', root: newNode('root')};
let ui;              // the elements of the view
let running = null;  // the answer that is being written: {node, controller, bubble, frame}
const tokenBoxes = new WeakMap();  // of answers whose tokens are shown: the element with them

// -------------------------------------------------------------------------------------------------
// The conversation

function path() {  // the messages that are shown
  const nodes = [];
  for (let node = state.root; (node = node.next[node.chosen]);) nodes.push(node);
  return nodes;
}

function addVersion(parent, node) {
  parent.chosen = parent.next.push(node) - 1;
  return node;
}
function remove(node, parent) {
  parent.next.splice(parent.next.indexOf(node), 1);
  parent.chosen = Math.min(parent.chosen, Math.max(0, parent.next.length - 1));
}

const textOf = ({text, parts}) =>
  text ?? parts.filter(part => part.kind === 'content').map(part => part.text).join('\n');
const untilQuestion = nodes => nodes.slice(0, nodes.findLastIndex(n => n.role === 'user') + 1);

function requestFor(nodes) {
  const messages = nodes.flatMap(
    node => node.role === 'user' ? {role: 'user', content: node.text} : turnsOf(node.parts));
  if (state.system.trim()) messages.unshift({role: 'system', content: state.system});
  return {model: app.model.model, messages};
}

// An answer in which tools ran is several messages: a turn with its calls, then their results.
function turnsOf(parts) {
  const list = [], results = [];
  let turn = {role: 'assistant', content: ''};
  parts.forEach((part, i) => {
    if (part.kind === 'content') turn.content += part.text;
    if (part.kind === 'reasoning') turn.reasoning_content = part.text;
    if (part.kind !== 'tool') return;
    const call = {name: part.name, arguments: part.arguments}, id = `call_${i}`;
    (turn.tool_calls ??= []).push({id, type: 'function', function: call});
    results.push({role: 'tool', tool_call_id: id, content: part.result});
    if (parts[i + 1]?.turn === part.turn) return;
    list.push(turn, ...results.splice(0));
    turn = {role: 'assistant', content: ''};
  });
  return turn.content || turn.reasoning_content || !list.length ? [...list, turn] : list;
}

// The messages in tokens. Behind a message of the user stands the beginning of an answer. The last
// answer has its own ids, or those of its text if another model wrote it.
async function tokenize(nodes) {
  const last = nodes.at(-1);
  const isOwn = last?.ids?.length && last.weights === app.model.system_fingerprint;
  const body = requestFor(isOwn ? nodes.slice(0, -1) : nodes);
  if (isOwn) body.answer_ids = last.ids;
  const asked = {with_pieces: true, with_places: true, origins: true};
  return (await postJson('tokenize', {...body, ...asked})).tokens;
}

async function idsAround(node, before) {  // [those in front of the answer, its own]
  const [prompt, all] = await Promise.all([tokenize(before), tokenize([...before, node])]);
  const ids = all.map(token => token.id);
  return [ids.slice(0, prompt.length), ids.slice(prompt.length)];
}

// -------------------------------------------------------------------------------------------------
// An answer while it is written

// A new version behind `parent`, which begins with `ids`; or `node` goes on from its `ids`.
async function answer(parent, before, ids = [], node = null) {
  if (running) return;
  const isNew = !node, times = {begin: performance.now(), given: ids.length};
  node ??= addVersion(parent, newNode('assistant', {parts: [], ids: []}));
  const run = running = {node, controller: new AbortController(), frame: 0};
  tokenBoxes.delete(node);
  showError(null);
  render();
  scrollToEnd();
  say('Answering');
  let finish = 'error';
  try {
    const body = {...requestFor(before), ...sampling(), return_token_ids: true,
                  stream_options: {include_usage: true}, ...ids.length && {answer_ids: ids}};
    for await (const event of streamEvents('v1/chat/completions', body, run.controller.signal)) {
      finish = takeEvent(node, event, times) ?? finish;
      run.frame ||= requestAnimationFrame(() => paint(run));
    }
  } catch (error) {
    if (error.name === 'AbortError') finish = 'stopped';
    else showError(inPlainWords(error));
  }
  cancelAnimationFrame(run.frame);
  if (running === run) running = null;
  if (times.begun) {
    const written = times.usage?.completion_tokens ?? node.ids.length - ids.length;
    const seconds = (times.last - times.first) / 1000;
    Object.assign(node, {
      finish, tokens: node.ids.length || written, context: times.usage?.total_tokens,
      wait: times.first && (times.first - times.begin) / 1000,
      speed: written > 1 && seconds > .01 ? (written - 1) / seconds : null,
    });
    say(`Done, ${formatNumber(node.tokens)} tokens, ${finish}`);
  } else if (isNew) {
    remove(node, parent);
  }
  render();
}

function inPlainWords(error) {
  if (error.code !== 'context_length_exceeded') return error;
  const {n_prompt_tokens: has, n_ctx: most} = error.details;
  return new Error(`The conversation is too long: it has ${has} tokens, with its answer it may ` +
    `have ${most}. Delete or shorten messages, or begin a new conversation.`);
}

function takeEvent(node, {choices: [choice], usage}, times) {  // returns its finish reason
  times.usage = usage ?? times.usage;
  if (!choice) return null;
  const {delta, token_ids: ids = [], finish_reason: finish} = choice;
  const {reasoning_content: reasoning, content, cake_tools: tools = []} = delta;
  if (!ids.length && !reasoning && !content && !tools.length) return finish;
  if (!times.begun) {  // the whole answer follows, from its first id
    const weights = app.model.system_fingerprint;
    times.begun = Object.assign(node, {parts: [], ids: [], weights, finish: 'stopped'});
  }
  node.ids.push(...ids);
  if (!times.given || node.ids.length > times.given) times.last = performance.now();
  times.first ??= times.last;
  for (const [kind, text] of [['reasoning', reasoning], ['content', content]]) {
    const last = node.parts.at(-1), more = (last ? text?.trimStart() : text) ?? '';
    if (last?.kind === kind) last.text += text ?? '';
    else if (more) node.parts.push({kind, text: more});
  }
  for (const tool of tools) node.parts.push({kind: 'tool', ...tool});
  return finish;
}

function stop() {
  running?.controller.abort();
  running = null;  // the next message can be sent at once
  render();
}

// A reader who is near to the end follows it.
const page = () => document.scrollingElement;
const isNearEnd = () => page().scrollHeight - innerHeight - page().scrollTop <= 40;  // pixels
const scrollToEnd = () => { page().scrollTop = page().scrollHeight; };

function paint(run) {  // once a frame, whatever came since the last one
  run.frame = 0;
  const follows = isNearEnd();
  fillParts(run.bubble, run.node.parts);
  if (follows) scrollToEnd();
}

// Adds to the element what the parts have more than it.
function fillParts(box, parts) {
  for (let i = Math.max(0, box.children.length - 1); i < parts.length; i++) {
    const part = parts[i], shown = box.children[i] ?? box.appendChild(partElement(part));
    if (part.text) shown.words.appendData(part.text.slice(shown.words.length));
  }
}

function partElement({kind, name, arguments: asked, result}) {
  const words = document.createTextNode(kind === 'tool' ? `${asked}\n→ ${result}` : '');
  const text = element('div', {class: 'text', dir: 'auto'}, words);
  if (kind === 'content') return Object.assign(text, {words});
  const title = kind === 'tool' ? `Tool: ${name || 'none of this name'}` : 'Thinking';
  return Object.assign(element('details', {}, element('summary', {}, title), text), {words});
}

// -------------------------------------------------------------------------------------------------
// The transcript

function render() {
  const nodes = path(), follows = isNearEnd(), hadFocus = ui.log.contains(document.activeElement);
  ui.log.replaceChildren(...nodes.map(
    (node, i) => messageElement(node, nodes[i - 1] ?? state.root, nodes.slice(0, i))));
  if (hadFocus) ui.text.focus({preventScroll: true});
  if (follows) scrollToEnd();
  ui.send.textContent = running ? 'Stop' : 'Send';
  showNext(nodes.length ? requestFor(untilQuestion(nodes)) : null);
  if (!running) Promise.resolve().then(save).then(showSeen).catch(showError);
}
const save = () => localStorage.setItem('chat', JSON.stringify(state));

const button = (label, action, more) => element('button', {
  type: 'button', class: 'plain', 'data-action': label,
  onclick: event => Promise.resolve(event).then(action).catch(showError), ...more,
}, label);

function messageElement(node, parent, before) {
  const isUser = node.role === 'user', {next, chosen} = parent;
  const bubble = element('div', {class: 'bubble'}), tokens = tokenBoxes.get(node);
  if (running?.node === node) running.bubble = bubble;
  fillParts(bubble, isUser ? [{kind: 'content', text: node.text}] : node.parts);
  const act = (label, action, more) => button(label, action, {disabled: running !== null, ...more});
  const turnTo = (label, name, i) => act(label, () => { parent.chosen = i; render(); },
    {'aria-label': name, disabled: running !== null || !next[i]});
  const goOn = async () => answer(parent, before, (await idsAround(node, before))[1], node);
  const actions = [
    ...next.length < 2 ? [] : [
      turnTo('‹', 'Older version', chosen - 1),
      element('span', {class: 'number'}, `${chosen + 1}/${next.length}`),
      turnTo('›', 'Newer version', chosen + 1)],
    ...isUser ? [] : [
      act('Regenerate', () => answer(parent, before)),
      node.finish === 'stop' ? null : act('Continue', goOn),
      act('Tokens', () => toggleTokens(node, parent, before), {'aria-pressed': String(!!tokens)})],
    act('Edit', () => edit(node, parent, before, article)),
    button('Copy', () => copy(textOf(node))),
    act('Delete', () => { remove(node, parent); render(); say('Deleted'); }),
  ];
  const article = element(
    'article', {class: `message ${node.role}`, 'aria-label': isUser ? 'You' : 'Answer'},
    tokens ?? bubble, isUser ? null : element('p', {class: 'note'}, lineUnder(node)),
    element('div', {class: 'actions'}, ...actions));
  return article;
}

const lineUnder = ({tokens, speed, wait, finish, context}) => [
  tokens && `${formatNumber(tokens)} tokens`, speed && `${Number(speed.toPrecision(3))} tokens/s`,
  wait && `first after ${wait.toFixed(2)} s`, finish && `finish: ${finish}`,
  context && `context ${context} of ${app.model.default_generation_settings.n_ctx}`,
].filter(Boolean).join(' · ');

// In its place, an editor: what it saves is another version, which the model answers.
function edit(node, parent, before, article) {
  const field = element('textarea', {'aria-label': 'Edited message', rows: 3, dir: 'auto'});
  field.value = textOf(node);
  const saveIt = () => {
    const text = field.value, isUser = node.role === 'user';
    const changed = addVersion(parent, newNode(node.role, isUser ? {text} : {
      parts: [{kind: 'content', text}], finish: 'edited'}));
    return isUser ? answer(changed, [...before, changed]) : render();
  };
  article.replaceChildren(field, element('div', {class: 'tools'}, button('Save', saveIt),
                                         button('Cancel', render)));
  field.focus();
}

// The answer's tokens, with the probabilities that the model gives them; one can be replaced.
async function toggleTokens(node, parent, before) {
  if (!tokenBoxes.delete(node)) {
    const [prompt, ids] = await idsAround(node, before), box = element('div');
    const {choices: [{logprobs}]} = await postJson('v1/completions', {
      model: app.model.model, prompt: [...prompt, ...ids], echo: true, max_tokens: 0, logprobs: 10,
      token_details: true,
    });
    const onAlternative = (i, {id}) => answer(parent, before, [...ids.slice(0, i), id]);
    const view = new ScoredTokens(box, {label: 'The answer in tokens', onAlternative});
    view.set(logprobs.content.slice(prompt.length));
    tokenBoxes.set(node, element('div', {}, colouringControls([view]), box));
  }
  render();
}

// -------------------------------------------------------------------------------------------------
// Around the transcript

async function showSeen() {  // the conversation as the model sees it
  if (!ui.seen.open) return;
  const encoder = new TextEncoder();
  const tokens = path().length || state.system.trim() ? await tokenize(path()) : [];
  const bytesOf = piece => typeof piece === 'string' ? encoder.encode(piece) : piece;
  ui.key.replaceChildren(...sourceKey(tokens));
  ui.tokens.set(markStretches(tokens.map(token => ({...token, bytes: bytesOf(token.piece)}))));
  ui.count.textContent = `${formatNumber(tokens.length)} tokens`;
}

async function copy(text) {
  await navigator.clipboard.writeText(text);
  say('Copied');
}

// The request for the last answer that is shown, as a command and as a program.
function copyAs(isCurl) {
  const body = JSON.stringify({...requestFor(untilQuestion(path())), ...sampling()}, null, 2);
  const url = `${location.origin}/v1`;
  return copy(isCurl
    ? `curl ${url}/chat/completions -H "Authorization: Bearer $CAKE_API_KEY" \\\n` +
      `  -d '${body.replaceAll("'", "'\\''")}'\n`
    : `import os\nfrom openai import OpenAI\n\nclient = OpenAI(base_url="${url}",\n` +
      '                api_key=os.environ.get("CAKE_API_KEY", "none"))\n' +
      `request = ${body}\nanswer = client.chat.completions.create(\n` +
      '  model=request.pop("model"), messages=request.pop("messages"), extra_body=request)\n' +
      'print(answer.choices[0].message.content)\n');
}

function send() {
  const nodes = path(), text = ui.text.value;
  if (running || !text.trim()) return;
  ui.text.value = '';
  const node = addVersion(nodes.at(-1) ?? state.root, newNode('user', {text}));
  answer(node, [...nodes, node]);
}

export function start(section) {
  state = JSON.parse(localStorage.getItem('chat')) ?? state;
  const box = element('div'), system = element('textarea', {
    'aria-label': 'System message', rows: 2, onchange: () => {
      state.system = system.value;
      render();
    }});
  ui = {
    log: element('div', {role: 'log', 'aria-live': 'off', 'aria-label': 'Conversation'}),
    text: element('textarea', {
      'aria-label': 'Message', placeholder: 'Enter sends, Shift+Enter makes a new line', rows: 2,
      dir: 'auto', onkeydown: event => {
        if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
        event.preventDefault();
        send();
      }}),
    send: button('Send', () => running ? stop() : send(), {class: 'primary end'}),
    seen: element('details', {ontoggle: () => showSeen().catch(showError)},
                  element('summary', {}, 'As the model sees it')),
    count: element('p', {class: 'note'}),
    key: element('ul', {class: 'legend', 'aria-label': 'What the tokens are from'}),
    tokens: new TokenView(box, {label: 'The conversation in tokens'}),
  };
  ui.seen.append(ui.count, ui.key, box);
  system.value = state.system;
  // An empty conversation beside the others: the arrows of the first message lead back to them.
  const beginAnew = () => {
    state.root.chosen = state.root.next.length;
    render();
    ui.text.focus();
  };
  section.append(
    element('details', {open: state.system !== ''}, element('summary', {}, 'System message'),
            system), ui.log, ui.seen,
    element('div', {class: 'dock'}, ui.text, element('div', {class: 'tools'},
      button('New conversation', beginAnew), button('Copy as curl', () => copyAs(true)),
      button('Copy as Python', () => copyAs(false)), ui.send)));
  section.addEventListener('keydown', event => event.key === 'Escape' && running && stop());
  window.addEventListener('pagehide', save);
}

export function show() { render(); scrollToEnd(); }
