const nameOf = reference => reference.split("/").at(-1);

// A schema in a few words.
function words(schema) {
  if (!schema || Object.keys(schema).length === 0) return "any";
  if (schema.$ref) return nameOf(schema.$ref);
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map(value => JSON.stringify(value)).join(" | ");
  for (const kind of ["anyOf", "allOf"]) if (schema[kind]) return schema[kind].map(words).join(kind === "anyOf" ? " | " : " & ");
  if (schema.type === "array") return `list of ${words(schema.items)}`;
  return Array.isArray(schema.type) ? schema.type.join(" | ") : schema.type;
}

// Names of the schemas that a schema refers to, directly.
function references(node, found = new Set()) {
  if (Array.isArray(node)) node.forEach(one => references(one, found));
  else if (node && typeof node === "object") for (const [name, value] of Object.entries(node)) {
    if (name === "$ref") found.add(nameOf(value)); else references(value, found);
  }
  return found;
}

// A text in which names stand between backticks.
function prose(text) {
  const made = make("span");
  text.split("`").forEach((part, at) => made.append(at % 2 ? make("code", "", part) : part));
  return made;
}

// Without the last column if it is empty.
function table(headings, rows) {
  if (rows.every(cells => !cells.at(-1))) [headings, ...rows] = [headings, ...rows].map(cells => cells.slice(0, -1));
  const made = make("table"), head = made.createTHead().insertRow();
  headings.forEach(heading => head.append(make("th", "", heading)));
  const body = made.createTBody();
  for (const cells of rows) {
    const row = body.insertRow();
    cells.forEach((cell, at) => { const data = row.insertCell(); data.append(at < 2 ? make("code", "", cell) : prose(cell)); });
  }
  return made;
}

function fields(schema) {
  const needed = new Set(schema.required ?? []);
  return table(["field", "type", "meaning"], Object.entries(schema.properties).map(([name, one]) =>
    [name, words(one), [needed.has(name) ? "required" : "", one.description ?? ""].filter(Boolean).join("; ")]));
}

function operation(method, path, given, schemas) {
  const shown = make("details", "operation"), summary = make("summary"), content = make("div", "content");
  summary.append(make("span", "method", method.toUpperCase()), make("code", "", path), ` ${given.summary ?? ""}`);
  const body = given.requestBody?.content["application/json"]?.schema;
  const named = body ? [...references(body)] : [];
  for (const name of named) {
    content.append(make("h3", "", `Body: ${name}`));
    content.append(schemas[name].properties ? fields(schemas[name]) : make("code", "", words(schemas[name])));
    for (const inner of references(schemas[name])) if (schemas[inner].properties && !named.includes(inner)) {
      content.append(make("h3", "", inner), fields(schemas[inner]));
    }
  }
  content.append(make("h3", "", "Responses"));
  content.append(table(["status", "body", "meaning"], Object.entries(given.responses).map(([status, one]) =>
    [status, Object.entries(one.content ?? {}).map(([kind, { schema }]) => `${words(schema)} (${kind})`).join(", "), one.description])));
  shown.append(summary, content);
  return shown;
}

async function load() {
  const answer = await fetch(`${base}openapi.json`);
  const document_ = await answer.json();
  byId("facts").textContent = `Redline ${document_.info.version}`;
  for (const [path, methods] of Object.entries(document_.paths)) for (const [method, given] of Object.entries(methods)) {
    byId("operations").append(operation(method, path, given, document_.components.schemas));
  }
}

load().catch(error => byId("operations").append(make("p", "facts bad", `the document can't be shown: ${error.message}`)));
