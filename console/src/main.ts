import { mount } from 'svelte';
import App from './App.svelte';
import './app.css';
import { readPlace, setTheme, shared } from './lib/state.svelte';

setTheme(shared.theme);
readPlace();
addEventListener('hashchange', readPlace);
mount(App, { target: document.getElementById('app')! });
