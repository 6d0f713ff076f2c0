// Conversations in this browser's IndexedDB. Heads (what the list shows) and bodies (the messages)
// are apart, so that a long history does not slow the list; one transaction writes both.

const NAME = "gemlax";
const CHANNEL = "gemlax.conversations";

let opened = null;

function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("heads", { keyPath: "id" });
      request.result.createObjectStore("bodies", { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Run `work` on both stores and wait until its transaction is on disk. */
async function write(work) {
  const database = await open();
  const transaction = database.transaction(["heads", "bodies"], "readwrite");
  work(transaction.objectStore("heads"), transaction.objectStore("bodies"));
  await new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

const channel = new BroadcastChannel(CHANNEL);

/** Call `changed(id)` when another tab wrote or removed a conversation. */
export function onOtherTab(changed) {
  channel.onmessage = (event) => changed(event.data);
}

/** List {id, title, created, updated}, the newest first. */
export async function heads() {
  const database = await open();
  const all = await done(database.transaction("heads").objectStore("heads").getAll());
  return all.sort((a, b) => b.updated - a.updated);
}

export async function load(id) {
  const database = await open();
  return (await done(database.transaction("bodies").objectStore("bodies").get(id))) ?? null;
}

export async function save(conversation) {
  const { id, title, created, updated } = conversation;
  await write((heads, bodies) => {
    heads.put({ id, title, created, updated });
    bodies.put(conversation);
  });
  channel.postMessage(id);
}

export async function remove(id) {
  await write((heads, bodies) => {
    heads.delete(id);
    bodies.delete(id);
  });
  channel.postMessage(id);
}

/** Return every conversation, the oldest first, for export. */
export async function all() {
  const database = await open();
  const bodies = await done(database.transaction("bodies").objectStore("bodies").getAll());
  return bodies.sort((a, b) => a.created - b.created);
}

/** Return the ids of conversations whose title or messages contain the words. */
export async function search(words) {
  const wanted = words.toLowerCase();
  const holds = (text) => (text ?? "").toLowerCase().includes(wanted);
  const database = await open();
  const hits = new Set();
  const request = database.transaction("bodies").objectStore("bodies").openCursor();
  await new Promise((resolve, reject) => {
    request.onerror = () => reject(request.error);
    request.onsuccess = () => {
      const cursor = request.result;
      if (cursor === null) return resolve();
      const { id, title, nodes } = cursor.value;
      if (holds(title) || nodes.some((node) => holds(node.content))) hits.add(id);
      cursor.continue();
    };
  });
  return hits;
}
