// Chats, and completions of single texts, as a stream.

const SETTINGS = ["temperature", "top_p", "top_k", "max_tokens", "seed", "presence_penalty"];
let conversation = [];  // messages as they are sent
let images = [];        // { name, url } chosen for the next message; the url has the data
let running = null;     // the AbortController of a request

const chats = () => byId("mode").value === "chat";

function showMessage(kind, role, text, pictures = []) {
  const shown = make("div", `message ${kind}`), body = make("div", "text", text);
  shown.append(make("div", "role", role));
  for (const { name, url } of pictures) { const image = make("img"); image.src = url; image.alt = name; shown.append(image); }
  shown.append(body);
  byId("messages").append(shown);
  scrollDown(true);
  return { shown, body };
}

// Scroll to the newest text, unless someone reads an older one.
function scrollDown(always) {
  const box = byId("messages");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < 60) box.scrollTop = box.scrollHeight;
}

// The fields of a request that the form sets; null if one is no number.
function settings() {
  const found = { model: byId("model").value, stream: true, stream_options: { include_usage: true } };
  for (const name of SETTINGS) {
    const field = byId(name);
    if (field.validity.badInput) { field.reportValidity(); return null; }
    if (field.value !== "") found[name] = Number(field.value);
  }
  return found;
}

function requestOf(text, fields) {
  if (!chats()) return ["v1/completions", { ...fields, prompt: text }];
  const parts = images.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  if (text) parts.push({ type: "text", text });
  conversation.push({ role: "user", content: images.length ? parts : text });
  const system = byId("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...conversation] : conversation;
  return ["v1/chat/completions", { ...fields, messages }];
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let begun = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (begun + value).split("\n\n");
    begun = parts.pop();
    for (const part of parts) if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

// What has arrived of one output, and its place on the page.
function makeOutput() {
  const { shown, body } = showMessage("assistant", chats() ? "Model" : "Completion", "");
  const output = { text: "", reasoning: "", usage: null, reason: null, begun: performance.now(), first: 0, last: 0 };
  let reasoning = null;
  output.add = event => {
    if (event.error) throw new Error(event.error.message);
    output.usage = event.usage ?? output.usage;
    for (const choice of event.choices) {
      const text = choice.text ?? choice.delta.content ?? "", thought = choice.delta?.reasoning_content ?? "";
      output.reason = choice.finish_reason ?? output.reason;
      output.text += text;
      output.reasoning += thought;
      if (text || thought) output.last = performance.now();
      output.first ||= output.last;
    }
    if (output.reasoning && !reasoning) {
      const details = make("details", "reasoning");
      reasoning = make("div", "text");
      details.append(make("summary", "", "Reasoning"), reasoning);
      body.before(details);
    }
    if (reasoning) reasoning.textContent = output.reasoning;
    body.textContent = output.text;
    scrollDown(false);
  };
  output.note = text => shown.append(make("div", "hint", text));
  output.remove = () => shown.remove();
  return output;
}

async function post(path, body, signal) {
  const answer = await fetch(base + path, {
    method: "POST", headers: { ...headers(), "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  });
  if (answer.status === 401) { setKey(""); askForKey("The server refused this key."); }
  if (!answer.ok) throw new Error(await errorOf(answer));
  return answer;
}

async function send(text, fields) {
  const pictures = images, history = conversation, before = history.length;
  const [path, body] = requestOf(text, fields);
  const { shown } = showMessage("user", chats() ? "You" : "Prompt", text, pictures);
  chooseImages([]);
  const output = makeOutput();
  setRunning(new AbortController());
  try {
    for await (const event of events(await post(path, body, running.signal))) output.add(event);
    output.note(spent(output));
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (output.first === 0) {  // as if it had not been sent
      history.length = before;
      output.remove();
      shown.remove();
      if (history === conversation) giveBack(text, pictures);
    } else output.note(stopped ? "stopped" : "not complete");
    if (!stopped) showMessage("error", "Error", causeOf(error)).shown.setAttribute("role", "alert");
  }
  if (history.length > before) history.push({ role: "assistant", content: output.text });
  setRunning(null);
}

// Put an input back where it was typed.
function giveBack(text, pictures) {
  byId("text").value ||= text;
  if (!images.length) chooseImages(pictures);
}

function spent({ usage, reason, begun, first, last }) {
  const parts = [];
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    parts.push(`${usage.prompt_tokens} prompt tokens${cached ? ` (${cached} cached)` : ""}`, `${usage.completion_tokens} output tokens`);
  }
  if (first) parts.push(`first after ${seconds((first - begun) / 1000)}`);
  if (usage?.completion_tokens > 1 && last > first) parts.push(`${number((usage.completion_tokens - 1) / (last - first) * 1000)} tokens/s`);
  if (reason === "length") parts.push("ended by the limit of tokens");
  return parts.join(" · ");
}

function setRunning(controller) {
  running = controller;
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  byId("mode").disabled = running !== null;
  byId("messages").setAttribute("aria-busy", String(running !== null));  // read out once it is complete
}

function chooseImages(chosen) {
  images = chosen;
  byId("chosen").replaceChildren(...chosen.map(one => {
    const button = make("button", "picture"), image = make("img");
    button.type = "button";
    button.setAttribute("aria-label", `Remove ${one.name}`);
    image.src = one.url;
    image.alt = "";
    button.append(image);
    button.addEventListener("click", () => chooseImages(images.filter(other => other !== one)));
    return button;
  }));
  byId("file").value = "";
}

function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve({ name: file.name, url: reader.result });
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

// Begin anew; a running request adds to the old conversation, which nobody sees.
function clear() {
  running?.abort();
  conversation = [];
  byId("messages").replaceChildren();
}

function setMode() {
  clear();
  byId("upload").hidden = !chats() || document.body.dataset.images !== "true";
  byId("system-label").hidden = !chats();
  byId("text").setAttribute("aria-label", chats() ? "Message" : "Prompt");
  byId("text").placeholder = chats() ? "Message" : "A text for the model to continue";
  chooseImages([]);
}

byId("compose").addEventListener("submit", event => {
  event.preventDefault();
  const text = byId("text").value, fields = settings();
  if (running || !fields || !(text.trim() || images.length)) return;
  byId("text").value = "";
  send(text, fields);
});
byId("settings").addEventListener("submit", event => event.preventDefault());
byId("text").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); byId("compose").requestSubmit(); }
});
byId("stop").addEventListener("click", () => { running?.abort(); byId("text").focus(); });
byId("clear").addEventListener("click", clear);
byId("mode").addEventListener("change", setMode);
byId("file").addEventListener("change", async event =>
  chooseImages([...images, ...await Promise.all([...event.target.files].map(readFile))]));
if (document.body.dataset.chats !== "true") {
  byId("mode").value = "completion";
  byId("mode").options[0].disabled = true;
  byId("chat-hint").hidden = false;
}
setMode();
