// SPDX-License-Identifier: Apache-2.0
"use strict";
const { title, videos } = JSON.parse(document.getElementById("data").textContent);
const $ = (selector) => document.querySelector(selector);
const PAGE = 60, AHEAD = 1500, SHOWN = 6; // cards made at a time, pixels before they are needed; objects on a card

// Text only, never markup: names come from the videos.
function make(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

const category = () => $("#category").value, threshold = () => Number($("#score").value);
const fits = (object) => object.score >= threshold() && (!category() || object.category === category());
const best = (video) => video.objects.reduce((most, object) => Math.max(most, object.score), 0);
const ORDERS = {
  "by name": () => 0, // as they come
  "most objects first": (a, b) => b.objects.filter(fits).length - a.objects.filter(fits).length,
  "best score first": (a, b) => best(b) - best(a),
  "longest first": (a, b) => b.frames - a.frames,
};

function facts(video) {
  const parts = [`${video.frames} frames`];
  if (video.fps) parts.push(`${(video.frames / video.fps).toFixed(1)} s`);
  if (video.size) parts.push(`${video.size[1]} × ${video.size[0]}`);
  parts.push(`${video.objects.length} object${video.objects.length === 1 ? "" : "s"}`);
  return parts.join(" · ");
}

function bar(object) {
  const canvas = make("canvas", "bar"), cells = object.present;
  canvas.width = Math.max(cells.length, 1);
  canvas.height = 1;
  canvas.style.imageRendering = "pixelated";
  canvas.title = `in ${object.frames} frames`;
  const context = canvas.getContext("2d");
  context.fillStyle = object.colour;
  [...cells].forEach((cell, i) => cell === "1" && context.fillRect(i, 0, 1, 1));
  return canvas;
}

function row(object) {
  const item = make("li"), swatch = make("span", "swatch");
  swatch.style.backgroundColor = object.colour;
  item.append(swatch, make("span", "", `${object.category} ${object.object_id}`), make("span", "number", object.score.toFixed(2)), bar(object));
  return item;
}

function card(video) {
  const article = make("article"), text = make("div", "text");
  if (video.strip) {
    const button = make("button"), image = make("img");
    image.loading = "lazy";
    image.alt = "";
    image.src = video.strip;
    button.append(image);
    button.setAttribute("aria-label", `play ${video.name}`);
    button.disabled = !video.overlay;
    button.addEventListener("click", () => play(video));
    article.append(button);
  }
  text.append(make("div", "name", video.name));
  text.append(video.error ? make("div", "error", `failed: ${video.error}`) : make("div", "facts", facts(video)));
  const objects = video.objects.filter(fits).sort((a, b) => b.score - a.score), list = make("ul", "objects");
  list.append(...objects.slice(0, SHOWN).map(row));
  text.append(list);
  if (objects.length > SHOWN) text.append(make("div", "facts", `and ${objects.length - SHOWN} more`));
  article.append(text);
  return article;
}

function play(video) {
  const dialog = $("#player"), screen = dialog.querySelector("video"), list = dialog.querySelector("ul");
  dialog.querySelector("h2").textContent = video.name;
  dialog.querySelector("p").textContent = facts(video);
  screen.src = video.overlay;
  list.replaceChildren(...video.objects.map(row));
  list.querySelectorAll("canvas").forEach((canvas) =>
    canvas.addEventListener("click", (event) => { screen.currentTime = (event.offsetX / canvas.clientWidth) * screen.duration; }));
  dialog.showModal();
  screen.play().catch(() => {}); // without permission to start by itself it waits for the user
}

function stop() {
  const screen = $("#player video");
  screen.removeAttribute("src");
  screen.load();
}

let chosen = [], made = 0;

// Cards are made as the reader comes near them, so thousands of videos open at once.
function more() {
  while (made < chosen.length && $("#more").getBoundingClientRect().top < innerHeight + AHEAD) {
    $("#videos").append(...chosen.slice(made, made + PAGE).map(card));
    made += PAGE;
  }
}

function show() {
  const text = $("#search").value.toLowerCase(), free = !category() && threshold() === 0;
  chosen = videos.filter((video) => video.name.toLowerCase().includes(text) && (free || video.objects.some(fits)));
  chosen.sort(ORDERS[$("#order").value]);
  $("#threshold").textContent = threshold().toFixed(2);
  $("#count").textContent = `${chosen.length} of ${videos.length} videos`;
  $("#videos").replaceChildren();
  made = 0;
  more();
}

function option(value, text) {
  const element = make("option", "", text);
  element.value = value;
  return element;
}

document.title = $("h1").textContent = title;
const categories = [...new Set(videos.flatMap((video) => video.objects.map((object) => object.category)))].sort();
$("#category").append(option("", "every class"), ...categories.map((name) => option(name, name)));
$("#order").append(...Object.keys(ORDERS).map((name) => option(name, name)));
for (const id of ["search", "category", "score", "order"]) $(`#${id}`).addEventListener("input", show);
$("#close").addEventListener("click", () => $("#player").close());
$("#player").addEventListener("close", stop);
new IntersectionObserver(more, { rootMargin: `${AHEAD}px` }).observe($("#more"));

// index.html#name=PART&class=NAME&score=0.5&play=VIDEO opens just so: for links.
const asked = new URLSearchParams(location.hash.slice(1));
$("#search").value = asked.get("name") ?? "";
$("#category").value = asked.get("class") ?? "";
$("#score").value = asked.get("score") ?? 0;
show();
const first = videos.find((video) => video.overlay && video.name === asked.get("play"));
if (first) play(first);
