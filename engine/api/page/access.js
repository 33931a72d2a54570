// The API key, and the models that the server has for it.

const KEY = "redline-key";
let key = sessionStorage.getItem(KEY) ?? "";

const headers = () => key ? { Authorization: `Bearer ${key}` } : {};

// What a failed response says.
async function errorOf(answer) {
  const text = await answer.text();
  try { return JSON.parse(text).error.message; } catch { return text || `${answer.status} ${answer.statusText}`; }
}

// What an exception says; a browser's own words for a lost connection say nothing.
function causeOf(error) {
  if (error.name === "TimeoutError") return "The server does not answer.";
  return error instanceof TypeError ? "The connection to the server was lost." : error.message;
}

function setKey(value) {
  key = value;
  if (key) sessionStorage.setItem(KEY, key); else sessionStorage.removeItem(KEY);
}

function askForKey(hint) {
  byId("use").hidden = true;
  byId("forget").hidden = true;
  byId("access").hidden = false;
  byId("access-hint").textContent = hint;
  byId("key").value = "";
  byId("key").focus();
}

async function loadModels() {
  if (!key && document.body.dataset.keys === "true") { askForKey("This server needs an API key."); return; }
  let answer;
  try { answer = await fetch(`${base}v1/models`, { headers: headers() }); }
  catch { byId("facts").textContent = "Reload the page once the server answers."; return; }
  if (answer.status === 401) { setKey(""); askForKey("The server refused this key."); return; }
  if (!answer.ok) { byId("facts").textContent = await errorOf(answer); return; }
  const models = (await answer.json()).data;
  byId("access").hidden = true;
  byId("forget").hidden = !key;
  byId("use").hidden = document.body.dataset.generates !== "true";
  byId("model").replaceChildren(...models.map(model => new Option(model.id, model.id)));
  const [first] = models;
  byId("title").textContent = first.id;
  document.title = `${first.id} · Redline`;
  byId("facts").textContent = `up to ${first.max_model_len.toLocaleString("en")} tokens per request`;
}

byId("access").addEventListener("submit", event => {
  event.preventDefault();
  setKey(byId("key").value.trim());
  loadModels();
});
byId("forget").addEventListener("click", () => { setKey(""); loadModels(); });
