// What a page of a report is drawn with: the histogram and the gallery of the console, over what the page says without them.
import { mount } from 'svelte';
import type { Entry } from './Images.svelte';
import Histogram from '../parts/Histogram.svelte';
import Images from './Images.svelte';

const text = (node: Element, selector: string) => node.querySelector(selector)?.textContent?.trim() ?? '';

/** A picture of the page's own list. */
function pictureOf(figure: Element) {
  const image = figure.querySelector('img');
  return {
    title: text(figure, 'figcaption'),
    source: image?.src,
    alt: image?.alt ?? '',
    width: image?.width,
    height: image?.height,
    href: figure.querySelector('a')?.href,
    none: text(figure, '.none'),
  };
}

/** An image of the page's own list. */
function entryOf(node: HTMLElement, place: number): Entry {
  const { outcome, type, score, wrong, decision } = node.dataset;
  return {
    key: `${place}`,
    title: text(node, 'h3'),
    text: text(node, 'p'),
    decision: decision as 'accept' | 'reject',
    outcome: outcome!,
    wrong: wrong !== undefined,
    pictures: [...node.querySelectorAll('figure')].map(pictureOf),
    type: type!,
    score: Number(score),
  };
}

const scores = document.getElementById('scores')!;
const groups = JSON.parse(scores.dataset.groups!);
scores.replaceChildren();
mount(Histogram, { target: scores, props: { groups, warn: null, reject: 1, label: scores.dataset.label! } });

const images = document.getElementById('images');
if (images) {
  const entries = [...images.querySelectorAll('li')].map(entryOf);
  images.replaceChildren();
  mount(Images, { target: images, props: { entries } });
}
