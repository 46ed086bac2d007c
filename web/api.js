// What all views of the page share: calls of the server's API, and elements.
//
// Nothing that a model or a user wrote is ever markup: `element` makes text nodes.

// The server's models, and the one that the page talks to.
export const app = {
  props: null,  // GET /props
  model: null,  // one of props.models: {model, is_chat, default_generation_settings, tools, ...}
};

export class ApiError extends Error {
  constructor(status, details = {}) {
    super(details.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = details.code ?? null;
    this.param = details.param ?? null;
    this.details = details;  // the error as it came
  }
}

// The API key lives as long as the tab.
export const key = {
  get: () => sessionStorage.getItem('key') ?? '',
  set: value => value ? sessionStorage.setItem('key', value) : sessionStorage.removeItem('key'),
};

async function request(path, options = {}) {
  const headers = {...options.headers};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const response = await fetch(path, {...options, headers}).catch(error => {
    if (error.name === 'AbortError') throw error;
    throw new ApiError(0, {message: 'the server does not answer', code: 'no_answer'});
  });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const error = new ApiError(response.status, body.error);
  if (error.status === 401) document.dispatchEvent(new CustomEvent('key-wanted', {detail: error}));
  throw error;
}

const post = body => ({
  method: 'POST',
  headers: {'Content-Type': 'application/json'},
  body: JSON.stringify(body),
});

export async function getJson(path) { return (await request(path)).json(); }
export async function postJson(path, body, signal) {
  return (await request(path, {...post(body), signal})).json();
}

// Yields each event of a stream as JSON, until [DONE]. Throws ApiError for an event that tells of
// an error, and when the stream ends before [DONE]. `signal` (of an AbortController) stops it.
export async function* streamEvents(path, body, signal) {
  const response = await request(path, {...post({...body, stream: true}), signal});
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const {value, done} = await reader.read();
    if (done) throw new ApiError(0, {message: 'the stream ended too early'});
    rest += value;
    const events = rest.split('\n\n');
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, '');
      if (data === '[DONE]') return;
      const json = JSON.parse(data);
      if (json.error) throw new ApiError(200, json.error);
      yield json;
    }
  }
}

// element('button', {type: 'button', class: 'plain', onclick: stop}, 'Stop'). Attributes whose
// value is a function are event handlers; null and false leave one out.
export function element(name, attributes = {}, ...children) {
  const e = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === 'function') e.addEventListener(key.slice(2), value);
    else if (value === true) e.setAttribute(key, '');
    else if (value !== null && value !== false && value !== undefined) e.setAttribute(key, value);
  }
  e.append(...children.filter(child => child !== null && child !== undefined));
  return e;
}

// Screen readers say it, politely: "Answering", "Done, 54 tokens". The page's only live region.
export function say(text) { document.getElementById('status').textContent = text; }

// An error that a person should see, in the page's alert bar; null removes it. A request that was
// stopped is none.
export function showError(error) {
  if (error?.name === 'AbortError') return;
  const bar = document.getElementById('error');
  bar.textContent = error ? error.message : '';
  bar.parentElement.hidden = !error;
}
